"""What every command of the terminal shares: how it ends, where it may write."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from geoedit.errors import EditError
from peft_analysis.errors import UpdateError

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on the standard output and nothing else there.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def run(work: Callable[[], None]) -> None:
    """Do the work; an error that a user can mend ends with 1 and one message, Ctrl-C with 130."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        work()
    except (EditError, UpdateError) as error:
        Console(stderr=True).print(
            "error: ", error, sep="", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def writable(folder: Path) -> None:
    """Fail before the work is done, not after it."""
    from geoedit.diagnosis.result import write_text

    probe = write_text(folder / ".geoedit-writable", "")
    probe.unlink()
