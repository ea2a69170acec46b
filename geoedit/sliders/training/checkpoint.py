"""A training run on disk: killed at any step, it goes on from its checkpoint and ends with the same bits."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.training.state_tree import from_bytes, to_bytes

KIND = "geoedit.checkpoint"
VERSION = 1
FOLDER = "checkpoints"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step of a run depends on, as it stands between two steps.

    A checkpoint is one file, so that it is there as a whole or not at all.

    Attributes:
        step: how many steps are done; the next one has this number.
        adapter: the adapter's tensors by name, over all components.
        optimizer: the optimizer's ``state_dict()``.
        generators: state of each random generator by name (``generator.get_state()``).
        task: the task's ``state()``: cached latents and the like.
        history: what was recorded of each step so far.
        settings: what the run was asked to do, as plain JSON; a run goes on only under equal settings.
    """

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    generators: Mapping[str, Tensor]
    task: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    settings: Mapping[str, Any]

    def save(self, output: str | PathLike[str], *, keep: int = 2) -> Path:
        """Write ``output/checkpoints/step-….safetensors``, then remove all but the newest `keep`.

        In a launch of several processes only the first one calls this.

        Raises:
            EditError: the folder cannot be written to, or a state holds what a file cannot.
        """
        if keep < 1:
            raise EditError(
                f"keep is {keep}: at least one checkpoint must stay, or there is nothing to resume"
            )
        folder = Path(output) / FOLDER
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content = to_bytes({"version": VERSION, **fields}, KIND)
        target = folder / f"step-{self.step:08d}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(target, content)
        except OSError as error:
            raise EditError(
                f"can't write {target}: {error.strerror or error}; give a folder that can be written to"
            ) from error
        # Files of later steps belong to a run that this one has replaced.
        kept = [path for path in _found(folder) if _step(path) <= self.step][-keep:]
        for path in {*_found(folder)} - {*kept} | {*folder.glob(".step-*.tmp")}:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return target

    @classmethod
    def load(
        cls, output: str | PathLike[str], *, settings: Mapping[str, Any] | None = None
    ) -> Checkpoint | None:
        """Read the newest checkpoint of a run; None if it has none. Tensors are on the CPU.

        A newest file that is damaged is passed over with a warning: the one before it leads to the same bits.

        Args:
            output: the run's folder.
            settings: what is asked for now; None: do not compare.

        Raises:
            EditError: all files are damaged or of a newer version, or the settings differ (it says in what).
        """
        found = _found(Path(output) / FOLDER)
        causes = []
        for path in reversed(found):
            try:
                checkpoint = cls._read(path)
            except EditError as error:
                causes.append(str(error))
                logger.warning("%s; the checkpoint before it is taken", error)
                continue
            if settings is not None:
                checkpoint.check(settings, output)
            return checkpoint
        if causes:
            raise EditError(
                f"no checkpoint in {output} can be read: {'; '.join(causes)}. Remove it to begin anew."
            )
        return None

    def check(self, settings: Mapping[str, Any], output: str | PathLike[str] = "the output") -> None:
        """Refuse to go on under other settings.

        Raises:
            EditError: a setting differs; the message names each with both values.
        """
        missing = object()
        differing = [
            f"{name} was {_short(self.settings, name)} and is now {_short(settings, name)}"
            for name in sorted({*self.settings, *settings})
            if _comparable(self.settings.get(name, missing)) != _comparable(settings.get(name, missing))
        ]
        if differing:
            raise EditError(
                f"{output} holds a run of {self.step} steps with other settings: {'; '.join(differing)}. "
                "Ask for the same again, or give another output folder."
            )

    @classmethod
    def _read(cls, path: Path) -> Checkpoint:
        try:
            fields = from_bytes(path.read_bytes(), KIND)
            version = fields.pop("version")
            if isinstance(version, int) and version <= VERSION:
                return cls(**fields)
        except (EditError, OSError, TypeError, KeyError, AttributeError) as error:
            raise EditError(f"{path} is no whole checkpoint: {error}") from error
        raise EditError(f"{path} has version {version!r}, this geoedit reads up to {VERSION}; update it")


def generator_states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """The states of random generators by name, as a checkpoint keeps them."""
    return {name: generator.get_state() for name, generator in generators.items()}


def set_generator_states(generators: Mapping[str, torch.Generator], states: Mapping[str, Tensor]) -> None:
    """Put random generators back to kept states.

    Raises:
        EditError: a generator has no kept state, or one of another kind of device.
    """
    for name, generator in generators.items():
        if name not in states:
            raise EditError(f"the checkpoint has no state of the generator {name!r}; it has {sorted(states)}")
        try:
            generator.set_state(states[name].cpu())
        except RuntimeError as error:
            raise EditError(
                f"the kept state of generator {name!r} does not fit one on {generator.device}: {error}. "
                "Resume with a generator on the device that it was begun with."
            ) from error


def _found(folder: Path) -> list[Path]:
    """Checkpoint files, oldest first."""
    return sorted(
        (path for path in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem)),
        key=_step,
    )


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _comparable(value: Any) -> Any:
    """Tuples and lists alike: a setting that went through JSON is the same setting."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _short(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "not there"
    text = repr(settings[name])
    return text if len(text) <= 60 else f"{text[:57]}…"
