"""A slider written as a LoRA: for diffusers, under kohya's names, or as a folder of peft."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialised
from torch import Tensor

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.files.names import kohya_key, peft_key
from geoedit.sliders.fit import MODEL
from geoedit.sliders.slider import Format, ModuleChange, Slider

SAFE = ".safetensors"
FOLDER_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
HEADER = "geoedit.slider"
VERSION = 1


def save(slider: Slider, path: str | PathLike[str], format: Format = "diffusers") -> None:
    """Write a slider to a safetensors file; it is there as a whole or not at all.

    Factors keep their dtype: `slider.to(torch.float16).save(…)` makes a file of half the size. Name,
    calibration and details go into the file's metadata, where `load` finds them and others do not look.

    - ``"diffusers"``: names and factors of peft (`unet.….lora_A.weight`), as `pipe.load_lora_weights` and
      `pipe.save_lora_weights` have them. Scale 1 of the file is factor 1 of the slider.
    - ``"kohya"``: `lora_unet_…`, `lora_te_…`, `lora_te1_…`, `lora_te2_…`, `lora_transformer_…` with
      `.lora_down`, `.lora_up` and `.alpha`. diffusers reads these names for Stable Diffusion 1, 2 and XL, for
      Flux where attention layers and embedders are changed, and not for Stable Diffusion 3.
    - ``"peft"``: a folder that `peft.PeftModel.from_pretrained` loads, for language models.

    Args:
        slider: the slider.
        path: a name that ends with .safetensors, or a folder that exists; for peft, the folder to make.
        format: one of the three.

    Raises:
        EditError: no such folder or format, a factor that is not finite, details that JSON cannot hold.
    """
    _check_finite(slider)
    if format == "peft":
        _save_folder(slider, Path(path))
        return
    if format not in ("diffusers", "kohya"):
        raise EditError(f'format {format!r} is not written; there are "diffusers", "kohya" and "peft"')
    target = Path(path)
    target = target / FOLDER_FILE if target.is_dir() else target
    if target.suffix != SAFE:
        raise EditError(f"{target.name} must end with {SAFE}; sliders are saved in that format")
    if not target.parent.is_dir():
        raise EditError(f"there is no folder {target.parent} to write {target.name} into")
    kohya = format == "kohya"
    alpha = float(Counter(change.matrix.rank for _, _, change in slider).most_common(1)[0][0])
    tensors: dict[str, Tensor] = {}
    keys: dict[str, dict[str, str]] = {}
    for component, module, change in slider:
        key = kohya_key(component, module, slider.changes) if kohya else peft_key(component, module)
        if f"{key}.lora_A.weight" in tensors or f"{key}.lora_down.weight" in tensors:
            raise EditError(f"slider {slider.name!r}: two modules would be called {key!r} in the file")
        keys.setdefault(component, {})[module] = key
        tensors.update(_kohya_tensors(key, change, alpha) if kohya else _peft_tensors(key, change))
    extra = {"ss_network_module": "networks.lora", "ss_network_alpha": f"{alpha:g}"} if kohya else {}
    if kohya:
        extra["ss_network_dim"] = str(max(change.matrix.rank for _, _, change in slider))
    write_whole(target, serialised(tensors, metadata={"format": "pt", **extra, HEADER: header(slider, keys)}))


def header(slider: Slider, keys: dict[str, dict[str, str]]) -> str:
    """What the metadata hold beside the factors, as JSON: where each module is, and what is known.

    Raises:
        EditError: details that JSON cannot hold.
    """
    content = {
        "version": VERSION,
        "name": slider.name,
        "calibration": None if slider.calibration is None else slider.calibration.to_dict(),
        "details": dict(slider.details),
        "modules": {
            component: {
                path: [key, list(slider.changes[component][path].kernel)] for path, key in paths.items()
            }
            for component, paths in keys.items()
        },
    }
    try:
        return json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as wrong:
        raise EditError(
            f"slider {slider.name!r}: its details are not plain JSON ({wrong}); make them finite numbers, "
            "strings, lists and dictionaries"
        ) from wrong


def _check_finite(slider: Slider) -> None:
    for component, path, change in slider:
        for factor in (change.matrix.left, change.matrix.right):
            if not bool(torch.isfinite(factor).all()):
                raise EditError(
                    f"slider {slider.name!r}: the change of {component}.{path} has NaN or infinite values; "
                    "it is not saved"
                )
        if change.matrix.rank == 0:
            raise EditError(
                f"slider {slider.name!r}: the change of {component}.{path} has rank 0, which no LoRA can "
                "hold; leave the module out"
            )


def _factors(change: ModuleChange) -> tuple[Tensor, Tensor]:
    """Second and first factor in the shapes of a linear layer or a convolution, detached copies."""
    left, right = change.matrix.left.detach(), change.matrix.right.detach()
    if change.kernel:
        left = left.reshape(*left.shape, *(1,) * len(change.kernel))
        right = right.reshape(right.shape[0], right.shape[1] // math.prod(change.kernel), *change.kernel)
    return left.contiguous().clone(), right.contiguous().clone()


def _peft_tensors(key: str, change: ModuleChange) -> Iterator[tuple[str, Tensor]]:
    left, right = _factors(change)
    yield f"{key}.lora_A.weight", right
    yield f"{key}.lora_B.weight", left


def _kohya_tensors(key: str, change: ModuleChange, alpha: float) -> Iterator[tuple[str, Tensor]]:
    """One α for all modules: diffusers does not find the α of a module whose rank is another."""
    left, right = _factors(change)
    yield f"{key}.lora_down.weight", right
    yield f"{key}.lora_up.weight", left * (change.matrix.rank / alpha)
    yield f"{key}.alpha", torch.tensor(alpha, dtype=left.dtype)


def _save_folder(slider: Slider, folder: Path) -> None:
    """A folder of peft; the settings come last, so that a folder without them is no adapter yet."""
    if list(slider.changes) != [MODEL]:
        raise EditError(
            f"slider {slider.name!r} changes {', '.join(slider.changes)}: a folder of peft is for one model; "
            "save "
            'pipelines\' sliders as "diffusers"'
        )
    if not folder.parent.is_dir() or folder.is_file():
        raise EditError(f"{folder} cannot be made: its parent is no folder, or it is a file")
    changes = slider.changes[MODEL]
    ranks = {path: change.matrix.rank for path, change in changes.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{path.replace('.', '[.]')}": rank for path, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(changes),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensors = dict(
        pair for path, change in changes.items() for pair in _peft_tensors(f"{PEFT_PREFIX}{path}", change)
    )
    text = header(slider, {MODEL: {path: f"{PEFT_PREFIX}{path}" for path in changes}})
    folder.mkdir(exist_ok=True)
    write_whole(folder / PEFT_FILE, serialised(tensors, metadata={"format": "pt", HEADER: text}))
    write_whole(folder / PEFT_CONFIG, json.dumps(config, indent=1).encode())
