"""Adapters in one file beside peft: kohya and A1111 LoRAs, LoCon, LoHa, LoKr, sliders, diffusers' LoRA files.

A module's tensors lie under its name and a role ('.lora_down.weight', '.alpha'). ΔW = (α / r) · up · down,
with α = r where the file has no α, as in kohya-ss/sd-scripts and diffusers. A LoCon's 'lora_mid' is the core
of a Tucker decomposition: ΔW[o, i, h, w] = Σ up[o, a] mid[a, b, h, w] down[b, i].
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import dora, loha, lokr, lora
from peft_analysis.updates.adapters.change import Change, Read, entry
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.adapters.settings import scaling_of
from peft_analysis.updates.entry import Layout
from peft_analysis.updates.files import Stored, TensorFile
from peft_analysis.updates.kohya_names import ModuleNames, guessed_path
from peft_analysis.updates.names import listed
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

DOWN, UP, MID, ALPHA, MAGNITUDE = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_mid",
    "alpha",
    "lora_magnitude_vector",
)
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
# The end of a key, and what it is called here: the roles of peft.
ROLES: dict[str, str] = {
    r"[._]lora(?:_linear_layer)?[._](?:down|A)(?:\.\w+)?\.weight": DOWN,
    r"[._]lora(?:_linear_layer)?[._](?:up|B)(?:\.\w+)?\.weight": UP,
    r"\.lora_mid\.weight": MID,
    r"[._]alpha": ALPHA,
    r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)": MAGNITUDE,
    r"\.(?:diff|w_norm)": "diff",
    r"\.(?:diff_b|b_norm)": "diff_b",
    **{rf"\.{name}": name for name in (*HADAMARD, *KRONECKER)},
}
SUFFIX = re.compile(f"(?:{'|'.join(f'(?P<r{number}>{pattern})' for number, pattern in enumerate(ROLES))})$")
MARKS = re.compile(
    r"lora_(down|up|A|B|mid)\b|\.lora\.(down|up)\.|_lora\.(down|up)\.|\.hada_|\.lokr_|dora_scale"
)
OLD_PROCESSOR = re.compile(r"\.processor\.(to_\w+?)$")
OLD_OUTPUT = re.compile(r"\.to_out_lora\.(?:(?:down|up)\.weight|alpha)$")
PEFT = "base_model.model."


def is_adapter_file(file: TensorFile) -> bool:
    """Whether a file holds an adapter's factors, and no full weights."""
    return any(MARKS.search(name) for name in file.tensors)


def read_adapter_file(base: "nn.Module | Weights | None", file: TensorFile) -> WeightUpdate:
    """The update in one file of factors.

    With a base, names are the base's parameters. Without, they are the file's, with the dots put back as
    well as can be guessed; each entry's `details["file_name"]` has the name in the file.

    Raises:
        UpdateError: modules that the base lacks, factors that do not fit, rank 0, α = 0, NaN, keys of an
            unknown kind; all of them are listed.
    """
    modules = _grouped(file)
    foundation = Foundation.of(base)
    paths = _paths(modules, foundation, file)
    scalings = _scalings_in_metadata(file)
    wrong: list[str] = []
    changes: dict[str, list[Change]] = defaultdict(list)
    for key, tensors in modules.items():
        try:
            module = _Module(key, paths[key], tensors, scalings.get(key))
            for change in _changes(module, foundation):
                details = {**change.details, "file_name": key}
                changes[change.name].append(replace(change, details=details))
        except UpdateError as error:
            wrong.append(str(error))
    if wrong:
        raise UpdateError(f"{file.path} does not fit {foundation.source}: {listed(wrong, '; ')}")
    names = list(changes)
    if foundation.weights is not None:
        names = [*(name for name in foundation.weights if name in changes), *names]  # in the model's order
    entries = {name: entry(changes[name], foundation) for name in dict.fromkeys(names)}
    told = "" if base is not None else "; parameters' names are guessed, give the base to have its own"
    return WeightUpdate(entries, base=foundation.weights, source=f"the adapter file {file.path}{told}")


@dataclass(frozen=True)
class _Module:
    """What a file holds for one module."""

    key: str
    path: str
    tensors: Mapping[str, Stored]
    scaling: float | None

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"


def _grouped(file: TensorFile) -> dict[str, dict[str, Stored]]:
    """The tensors of each module, by role."""
    if any(name.startswith(PEFT) or ".base_layer." in name for name in file.tensors):
        raise UpdateError(
            f"{file.path} holds tensors of peft, whose scaling is in adapter_config.json; give the folder of "
            "both, as save_pretrained writes it"
        )
    modules: dict[str, dict[str, Stored]] = defaultdict(dict)
    unknown = []
    names = list(ROLES.values())
    for name, stored in file.tensors.items():
        match = SUFFIX.search(name)
        if match is None or match.start() == 0:
            unknown.append(name)
            continue
        role = next(names[int(group[1:])] for group, found in match.groupdict().items() if found is not None)
        key = OLD_PROCESSOR.sub(r".\1", name[: match.start()])
        if OLD_OUTPUT.search(name):  # the linear layer stands in a list with its dropout
            key = f"{key.removesuffix('_lora')}.0"
        modules[key][role] = _finite(name, stored, file)
    if unknown:
        raise UpdateError(
            f"{file.path}: {len(unknown)} keys are of no kind that is read (LoRA, LoCon, LoHa, LoKr, DoRA, "
            f"full differences): {listed(sorted(unknown))}"
        )
    return dict(modules)


def _finite(name: str, stored: Stored, file: TensorFile) -> Stored:
    return replace(stored, read=partial(_read_finite, name, stored, str(file.path)))


def _read_finite(name: str, stored: Stored, source: str) -> Tensor:
    value = stored.read()
    if not bool(torch.isfinite(value).all()):
        raise UpdateError(f"{source}: {name} has NaN or infinite values; training diverged, or it is damaged")
    return value


def _paths(modules: Mapping[str, object], foundation: Foundation, file: TensorFile) -> dict[str, str]:
    """The path of each module in the base, or a guess where there is none."""
    if foundation.weights is None:
        return {key: guessed_path(key) for key in modules}
    names = ModuleNames(foundation.weights)
    found = {key: names.find(key) for key in modules}
    absent = [key for key, paths in found.items() if not paths]
    unclear = [f"{key} ({' or '.join(paths[:3])})" for key, paths in found.items() if len(paths) > 1]
    if absent or unclear:
        parts = [f"it has no module for {listed(absent)}"] if absent else []
        parts += [f"several modules may be meant by {listed(unclear)}"] if unclear else []
        raise UpdateError(
            f"{file.path} does not fit {foundation.source}: {'; '.join(parts)}. Give the model that it was "
            "trained on; for a file with parts for text encoders, the pipeline's folder"
        )
    twice = [path for path, count in _counts(found).items() if count > 1]
    if twice:
        raise UpdateError(f"{file.path}: several names mean {listed(twice)}; is this the right base?")
    return {key: paths[0] for key, paths in found.items()}


def _counts(found: Mapping[str, list[str]]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for paths in found.values():
        counts[paths[0]] += 1
    return counts


def _scalings_in_metadata(file: TensorFile) -> dict[str, float]:
    """α / r of each module, where diffusers wrote the settings of peft into the file's metadata."""
    try:
        settings = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as broken:
        raise UpdateError(f"{file.path}: lora_adapter_metadata is not JSON: {broken}") from broken
    found: dict[str, float] = {}
    for part in {key.split(".")[0] for key in settings}:
        own = {
            key.removeprefix(f"{part}."): value
            for key, value in settings.items()
            if key.startswith(f"{part}.")
        }
        for name, stored in file.tensors.items():
            match = SUFFIX.search(name)
            if match is None or not name.startswith(f"{part}."):
                continue
            key = name[: match.start()]
            if re.search(r"[._](down|A)(\.\w+)?\.weight$", name):
                path = key.removeprefix(f"{part}.")
                found[key] = scaling_of(own, path, stored.shape[0])
    return found


def _changes(module: _Module, foundation: Foundation) -> Iterator[Change]:
    tensors = dict(module.tensors)
    alpha = tensors.pop(ALPHA, None)
    for role, name in (("diff", module.weight), ("diff_b", f"{module.path}.bias")):
        if role in tensors:
            yield _whole(name, tensors.pop(role), foundation)
    if not tensors:
        return
    if HADAMARD[0] in tensors:
        family, rank = loha.changes, _shortest(tensors, HADAMARD[:4])
    elif tensors.keys() & set(KRONECKER):
        family, rank = lokr.changes, _shortest(tensors, ("lokr_w1_b", "lokr_w2_b"))
    else:
        tensors = _as_peft(module, tensors, foundation)
        family, rank = dora.changes if MAGNITUDE in tensors else lora.changes, tensors[DOWN].shape[0]
    if MAGNITUDE in tensors and family is not dora.changes:
        raise UpdateError(f"{module.key}: a magnitude (dora_scale) beside LoHa or LoKr factors is not read")
    scaling = _scaling(module, alpha, rank)
    yield from family(Part(module.path, tensors, {}, scaling=scaling), foundation)


def _scaling(module: _Module, alpha: Stored | None, rank: int | None) -> float:
    """α / r; 1 where there is no α, or where nothing has a rank (LoKr of two whole matrices)."""
    if alpha is None:
        return 1.0 if module.scaling is None else module.scaling
    if alpha.shape.numel() != 1:
        raise UpdateError(f"{module.key}: alpha has shape {tuple(alpha.shape)}; it is one number")
    value = float(alpha.read().reshape(()))
    if value == 0:
        raise UpdateError(f"{module.key}: alpha is 0, with which the adapter changes nothing")
    if rank == 0:
        raise UpdateError(f"{module.key}: rank 0; such an adapter changes nothing")
    return 1.0 if rank is None else value / rank


def _shortest(tensors: Mapping[str, Stored], roles: tuple[str, ...]) -> int | None:
    """The rank: the least size of the factors that are there."""
    sizes = [min(tensors[role].shape) for role in roles if role in tensors and len(tensors[role].shape) >= 2]
    return min(sizes) if sizes else None


def _as_peft(module: _Module, tensors: dict[str, Stored], foundation: Foundation) -> dict[str, Stored]:
    """Factors in the shapes that peft gives them: a Tucker core inside 'down', kernels of 1 as the base's."""
    missing = [role for role in (DOWN, UP) if role not in tensors]
    if missing:
        there = ", ".join(sorted(tensors))
        raise UpdateError(f"{module.key}: its down or up factor is missing; there is {there}")
    if MAGNITUDE in tensors and tensors[MAGNITUDE].shape[:1] != tensors[UP].shape[:1]:
        raise UpdateError(
            f"{module.key}: dora_scale has shape {tuple(tensors[MAGNITUDE].shape)}, a norm for each input; "
            "only norms of outputs are read (wd_on_output=True)"
        )
    down, up = tensors[DOWN], tensors[UP]
    if len(up.shape) > 2 and up.shape[2:].numel() != 1:
        raise UpdateError(f"{module.key}: its up factor has a kernel {tuple(up.shape[2:])}; 1 is read")
    middle = tensors.pop(MID, None)
    if middle is not None:
        shape = torch.Size((middle.shape[0], down.shape[1], *middle.shape[2:]))
        down = Stored(shape, down.dtype, partial(_through_kernel, middle, down))
    if foundation.weights is not None and module.weight in foundation:
        wanted = foundation.weights.shape(module.weight)
        if foundation.weights.layout(module.weight) != "in_out" and len(wanted) >= 2:
            whole = torch.Size((down.shape[0], *wanted[1:]))
            if whole != down.shape and whole.numel() == down.shape.numel():
                down = Stored(whole, down.dtype, partial(_reshaped, down, whole))
    return {**tensors, DOWN: down}


def _through_kernel(middle: Stored, down: Stored) -> Tensor:
    first, kernel = down.read().flatten(1), middle.read()
    wide = torch.promote_types(torch.promote_types(first.dtype, kernel.dtype), torch.float32)
    return torch.einsum("abhw,bi->aihw", kernel.to(wide), first.to(wide))


def _reshaped(stored: Stored, shape: torch.Size) -> Tensor:
    return stored.read().reshape(shape)


def _whole(name: str, stored: Stored, foundation: Foundation) -> Change:
    """A difference that is stored as it is."""
    shape = stored.shape
    layout: Layout = "out_in" if len(shape) >= 2 else "other"
    if foundation.weights is not None:
        if name not in foundation:
            raise UpdateError(f"{name} is not in {foundation.source}")
        shape, layout = foundation.weights.shape(name), foundation.weights.layout(name)
        if shape.numel() != stored.shape.numel():
            raise UpdateError(f"{name} has shape {tuple(shape)}, its difference {tuple(stored.shape)}")
    return Change(
        name=name,
        shape=shape,
        delta=partial(_stored_difference, stored, shape, foundation),
        kind="difference",
        layout=layout,
    )


def _stored_difference(
    stored: Stored, shape: torch.Size, foundation: Foundation, current: Read, start: Read
) -> Tensor:
    return foundation.placed(stored.read()).reshape(shape)
