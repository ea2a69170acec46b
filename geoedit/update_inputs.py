"""What a user writes on the command line of an update: names of weights, numbers, lists in files."""

from __future__ import annotations

from pathlib import Path

from geoedit.errors import EditError

NONE = "none"


def find_weights(name: str) -> Path | None:
    """Where weights lie: a built-in model, a path, a hub id; None for "none".

    Raises:
        EditError: there is no such thing.
    """
    from geoedit.testbeds import TESTBEDS, folder

    if name == NONE:
        return None
    if name in TESTBEDS:
        return folder(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    from geoedit.loading import check_hub_id

    check_hub_id(name, TESTBEDS)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        text = str(error).strip().splitlines()
        raise EditError(
            f"can't get {name!r}: {text[0] if text else type(error).__name__} If it is a folder, the path "
            "does not exist; if it is a hub id, check its spelling and the network."
        ) from error


def read_side(text: str) -> int | None:
    """Read --base-svd: a number, 'all' (None) or 'none' (0).

    Raises:
        EditError: it is none of these.
    """
    if text in ("all", NONE):
        return None if text == "all" else 0
    if not text.isdecimal():
        raise EditError(f"--base-svd is {text!r}; give a number, 'all' or 'none'.")
    return int(text)


def read_numbers(text: str | None, count: int) -> list[float]:
    """Read --weights: as many numbers as there are updates, ones if there are none.

    Raises:
        EditError: they are not numbers, or another count.
    """
    if text is None:
        return [1.0] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise EditError(f"--weights is {text!r}; give numbers separated by commas: 1,-0.7.") from None
    if len(numbers) != count:
        raise EditError(f"--weights has {len(numbers)} numbers for {count} updates; give one for each.")
    return numbers


def read_lines(text: str) -> list[str]:
    """Read a list: the lines of a file, or what stands between commas.

    Raises:
        EditError: the file is empty or can't be read.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        found = [part.strip() for part in text.split(",")]
    else:
        try:
            found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise EditError(
                f"can't read {text!r}: {error}; give a text file with one entry a line."
            ) from error
    found = [entry for entry in found if entry]
    if not found:
        raise EditError(f"{text!r} names nothing; give one entry a line, or entries between commas.")
    return found
