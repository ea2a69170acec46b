"""The weights that lie at a path: a model's folder, a pipeline's folder, or one file."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.anatomy import Anatomy, anatomy
from peft_analysis.updates.files import SAFE, TORCH, TensorFile, open_file, open_shards, read_json
from peft_analysis.updates.stored_names import as_model_names
from peft_analysis.updates.weights import Weights

log = logging.getLogger(__name__)
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
BESIDE = ("adapter_model", "training_args", "optimizer", "scheduler", "rng_state")  # no weights of a model
SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)$")
PIPELINE = "model_index.json"


def weights_at(path: Path, model: nn.Module | None = None) -> Weights:
    """The weights of a folder or a file, named as the model's class names them where a config tells it.

    A pipeline's folder gives the weights of all its parts, with the part's name in front ('unet.').

    Args:
        path: the folder or the file.
        model: stands in for a config where there is none beside the weights.

    Raises:
        UpdateError: there is nothing, no weights, an adapter, a missing shard, a file that is cut off.
    """
    if not path.exists():
        raise UpdateError(f"there is no folder or file {str(path)!r}; a model of the hub is downloaded first")
    if (path / PIPELINE).is_file():
        return _pipeline(path)
    stored = open_file(path) if path.is_file() else open_folder(path)
    described = meta_model(path if path.is_dir() else path.parent)
    return weights_of(replace(stored, path=path), described if described is not None else model)


def weights_of(stored: TensorFile, model: nn.Module | None = None) -> Weights:
    """The weights of files, with what a model's structure says of them, if it is known."""
    parts = Anatomy() if model is None else anatomy(model)
    tensors = dict(stored.tensors if model is None else as_model_names(stored.tensors, model))
    own = parts.parameters.keys() | parts.buffers.keys() | parts.tied.keys()
    known = Weights.of_tensors(
        dict.fromkeys(own, torch.empty(0)), skipped=parts.skipped, ignored=parts.ignored
    )
    skipped = {name: reason for name in tensors if (reason := known.why_skipped(name))}
    kept = {name: value for name, value in tensors.items() if name not in skipped}
    tied = {}
    for other, name in parts.tied.items():
        if name not in kept and other in kept:
            kept[name] = kept.pop(other)  # stored under the other of its names
        if name in kept and (other not in kept or torch.equal(kept[other].read(), kept[name].read())):
            kept.pop(other, None)
            tied[other] = name
    places = {name: place for place, name in enumerate((*parts.parameters, *parts.buffers))}
    kept = dict(sorted(kept.items(), key=lambda item: places.get(item[0], len(places))))  # as the model's
    return Weights(
        {name: value.read for name, value in kept.items()},
        shapes={name: value.shape for name, value in kept.items()},
        dtypes={name: value.dtype for name, value in kept.items()},
        layouts={name: layout for name, layout in parts.layouts.items() if name in kept},
        source=str(stored.path),
        tied=tied,
        embeddings=parts.embeddings.intersection(kept),
        tokens=parts.tokens.intersection(kept),
        skipped={**parts.skipped, **skipped},
        ignored=parts.ignored,
        model=model,
        mapped=frozenset(name for name, value in kept.items() if value.mapped),
    )


def open_folder(folder: Path) -> TensorFile:
    """The tensors of a folder: its one file of weights, or shards by their index or their numbers.

    Raises:
        UpdateError: no weights, an adapter's folder, missing shards, several files that may be meant.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for ending in (SAFE, *TORCH):
        files = [name for name in names if name.endswith(ending) and not name.startswith(BESIDE)]
        shards = [name for name in files if SHARD.match(Path(name).stem)]
        whole = sorted(name for name in files if name not in shards)
        usual = [f"{stem}{ending}" for stem in STEMS if f"{stem}{ending}" in whole]
        indexes = [name for name in names if name.endswith(f"{ending}.index.json")]
        if usual:
            return open_file(folder / usual[0])
        if len(indexes) == 1 or f"{STEMS[0]}{ending}.index.json" in indexes:
            return _indexed(folder, sorted(indexes, key=lambda name: not name.startswith(STEMS[0]))[0])
        if len(whole) > 1:
            raise UpdateError(
                f"{folder} holds several files of weights: {', '.join(whole)}; give one of them"
            )
        if whole:
            return open_file(folder / whole[0])
        if shards:
            return _numbered(folder, shards)
    if (folder / "adapter_config.json").is_file():
        raise UpdateError(f"{folder} holds an adapter, not a model's weights; give the base model's folder")
    raise UpdateError(f"{folder} holds no weights (*.safetensors, or *.bin / *.pt of plain tensors)")


def meta_model(folder: Path) -> nn.Module | None:
    """The model that a folder's config describes, without values; None if transformers has no such class."""
    path = folder / "config.json"
    described = read_json(path) if path.is_file() else None
    if not isinstance(described, dict) or "model_type" not in described:
        return None
    import transformers

    named = described.get("architectures") or []
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found: Any = getattr(transformers, str(named[0]), None) if named else None
        with torch.device("meta"):
            if found is not None:
                return found(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as unknown:
        log.warning(
            "%s: transformers does not know this model (%s); its layout is told from shapes alone",
            path,
            unknown,
        )
        return None


def _pipeline(folder: Path) -> Weights:
    index = read_json(folder / PIPELINE)
    parts = [name for name in index if (folder / name / "config.json").is_file()]
    if not parts:
        raise UpdateError(
            f"{folder} has a {PIPELINE}, but no part of it has a config.json; copy the whole folder"
        )
    return Weights.joined({name: weights_at(folder / name) for name in parts}, source=str(folder))


def _indexed(folder: Path, index: str) -> TensorFile:
    content = read_json(folder / index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise UpdateError(f"{folder / index} has no weight_map; save the model again")
    return open_shards(folder, {name: folder / str(file) for name, file in places.items()})


def _numbered(folder: Path, shards: list[str]) -> TensorFile:
    found = [match for name in shards if (match := SHARD.match(Path(name).stem))]
    sets = {(match["stem"], match["count"]) for match in found}
    if len(sets) > 1:
        raise UpdateError(f"{folder} holds shards of several models: {', '.join(shards)}; give them apart")
    count = int(found[0]["count"])
    numbers = {int(match["number"]) for match in found}
    absent = sorted(set(range(1, count + 1)) - numbers)
    if absent:
        raise UpdateError(f"{folder} lacks shards {absent} of {count}; copy the whole folder")
    return replace(open_shards(folder, [folder / name for name in shards]), path=folder)
