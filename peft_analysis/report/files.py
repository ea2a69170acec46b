"""Text files, written whole or not at all."""

import os
import tempfile
from pathlib import Path

from peft_analysis.errors import UpdateError


def write_text(path: str | Path, text: str) -> Path:
    """Write through a temporary file beside the path, so that no half-written file is ever seen.

    Raises:
        UpdateError: the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UpdateError(
            f"can't write {path}: {error.strerror or error}; give a path that can be written to"
        ) from error
    return path
