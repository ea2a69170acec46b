"""Sliders read from files: ours, diffusers', kohya's, published ones, Flux under its first names."""

from __future__ import annotations

import json
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.files.fused import fused_modules, split_fused
from geoedit.sliders.files.names import place_of, unflattened
from geoedit.sliders.files.write import FOLDER_FILE, HEADER, PEFT_CONFIG, PEFT_FILE, VERSION
from geoedit.sliders.fit import MODEL, components_of, fitting
from geoedit.sliders.slider import ModuleChange, Slider
from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates import WeightUpdate, read_update
from peft_analysis.updates.files import TORCH, Stored, TensorFile, load_torch, open_file
from peft_analysis.updates.kohya import is_adapter_file, read_adapter_file


def load(path: str | PathLike[str], pipe: Any = None) -> Slider:
    """Read a slider: what `save` wrote, or a LoRA of others.

    Read are files of diffusers and peft, of kohya's scripts and of A1111, the published sliders (`.pt` and
    `.safetensors`), diffusers' old attention processors, LoCon, LoHa and LoKr, and Flux under the names of
    its first release, fused q, k and v in their parts. `.pt` files load with ``weights_only=True``: nothing
    in them is run. Factors stay on the CPU; scale 1 is scale 1 of the file, α / rank counted in.

    Args:
        path: the file, or a folder of diffusers or peft.
        pipe: the pipeline or model that it is for. Foreign names are found in it; without it, dots are put
            back where they most likely were, and `at` says if that was wrong.

    Raises:
        EditError: no such file, one that is cut off or no LoRA, one that does not fit the pipeline, NaN,
            α = 0, changes of biases.
    """
    source = Path(path).expanduser()
    try:
        folder = source.is_dir() and (source / PEFT_CONFIG).is_file()
        file = _at_once(open_file(_file_in(source)))
        if HEADER in file.metadata:
            return _ours(file, pipe)
        return _foreign(file, source if folder else None, pipe)
    except UpdateError as wrong:
        raise EditError(str(wrong)) from wrong


def _at_once(file: TensorFile) -> TensorFile:
    """A torch file with its tensors read together: each alone would go through the whole file again."""
    if file.path.suffix not in TORCH:
        return file
    tensors = {
        name: Stored(value.shape, value.dtype, value.detach)
        for name, value in load_torch(file.path, mapped=False).items()
    }
    return replace(file, tensors=tensors)


def _file_in(source: Path) -> Path:
    """The file of a folder, or the file itself."""
    if not source.is_dir():
        return source
    for name in (FOLDER_FILE, PEFT_FILE):
        if (source / name).is_file():
            return source / name
    raise EditError(f"{source} holds neither {FOLDER_FILE} nor {PEFT_FILE}; give the file")


def _ours(file: TensorFile, pipe: Any) -> Slider:
    """What `save` wrote: the header says where each module is."""
    try:
        header = json.loads(file.metadata[HEADER])
        version = header["version"]
        if not isinstance(version, int) or version > VERSION:
            raise EditError(f"{file.path} has version {version!r} of the slider format; update this package")
        changes: dict[str, dict[str, ModuleChange]] = {}
        for component, modules in header["modules"].items():
            for path, (key, kernel) in modules.items():
                changes.setdefault(component, {})[path] = _change(file, key, tuple(kernel))
        calibration = header["calibration"]
        found = Slider(
            str(header["name"]),
            changes,
            None if calibration is None else Calibration.from_dict(calibration),
            dict(header["details"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as broken:
        if isinstance(broken, EditError | UpdateError):
            raise
        raise EditError(
            f"{file.path} has a damaged description ({broken!r}); save the slider again"
        ) from broken
    if pipe is not None:
        fitting(found, pipe)
    return found


def _change(file: TensorFile, key: str, kernel: tuple[int, ...]) -> ModuleChange:
    peft = f"{key}.lora_A.weight" in file.tensors
    down, up = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
    right, left = (_finite(file, f"{key}.{role}.weight") for role in (down, up))
    if not peft:
        left = left * (float(_finite(file, f"{key}.alpha")) / right.shape[0])
    return ModuleChange(LowRank(left.flatten(1), right.flatten(1)), kernel)


def _finite(file: TensorFile, name: str) -> Tensor:
    value = file.tensors[name].read()
    if not bool(torch.isfinite(value).all()):
        raise EditError(f"{file.path}: {name} has NaN or infinite values; it is damaged")
    return value


def _foreign(file: TensorFile, folder: Path | None, pipe: Any) -> Slider:
    base = None if pipe is None else _base(pipe)
    alone = folder is not None if pipe is None else isinstance(pipe, nn.Module)  # no pipeline, but one model
    wide = set() if folder is not None else fused_modules(file)
    if folder is not None:
        update = read_update(base, folder)
    else:
        file = split_fused(file)
        if not is_adapter_file(file):
            raise EditError(
                f"{file.path} holds no factors of a LoRA; full weights are read by read_update(base, file)"
            )
        update = read_adapter_file(base, file if base is not None else _guessed(file))
    changes: dict[str, dict[str, ModuleChange]] = {}
    for name in update:
        path = name.removesuffix(".weight")
        component, path = (MODEL, path) if alone else place_of(path)
        change = _module_change(update, name, narrow=name.removesuffix(".weight") in wide)
        changes.setdefault(component, {})[path] = change
    name = file.metadata.get("ss_output_name") or (folder or file.path).stem
    return Slider(name, changes, details={"source": str(file.path)})


def _base(pipe: Any) -> nn.Module:
    """The components of a pipeline as one module, whose names begin with the component; a model itself."""
    return pipe if isinstance(pipe, nn.Module) else nn.ModuleDict(components_of(pipe))


def _guessed(file: TensorFile) -> TensorFile:
    """The file with dots in its names, where there is no base to find them in."""
    from peft_analysis.updates.kohya import SUFFIX

    renamed = {}
    for name, stored in file.tensors.items():
        match = SUFFIX.search(name)
        cut = len(name) if match is None else match.start()
        renamed[f"{unflattened(name[:cut])}{name[cut:]}"] = stored
    return replace(file, tensors=renamed)


def _module_change(update: WeightUpdate, name: str, *, narrow: bool) -> ModuleChange:
    entry = update.entries[name]
    if not name.endswith(".weight") or len(entry.shape) < 2 or entry.layout == "other":
        raise EditError(
            f"{update.source}: it changes {name} {tuple(entry.shape)}; a slider changes linear layers and "
            "convolutions. Apply it as a whole with read_update(base, file).apply(model)"
        )
    value = update.matrix(name)
    if isinstance(value, Tensor):
        matrix = LowRank.from_dense(value)
    else:
        matrix = value.recompress() if narrow else value
    return ModuleChange(matrix, tuple(entry.shape[2:]))
