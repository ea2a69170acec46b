"""Kinds without a formula of their own here: peft's own layer merges one matrix at a time."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.copies import copied, skeleton
from peft_analysis.updates.adapters.folder import PREFIX
from peft_analysis.updates.adapters.foundation import Foundation, wide
from peft_analysis.updates.adapters.live import layers
from peft_analysis.updates.files import Stored
from peft_analysis.updates.names import listed

SHARING = frozenset({"RANDLORA"})
"""Kinds whose modules share tensors, beside those of which peft says so."""
ORDERED = frozenset({"TINYLORA", "UNILORA"})
"""Kinds that give out shared numbers in the order of the base's modules."""
BIASED = frozenset({"GLORA", "ROAD", "BEFT"})
"""Kinds that change the bias, too; BEFT that alone."""
Layer = Callable[[], Any]


def changes(
    make: Layer,
    path: str,
    adapters: Collection[str],
    kind: str,
    foundation: Foundation,
    *,
    fresh: bool = False,
) -> Iterator[Change]:
    """The changes of one module's parameters by peft's own merge.

    Args:
        make: gives a layer of peft that may be changed, without merged adapters.
        path: of the module in the base.
        adapters: the names of those to merge, in their order.
        kind: of the adapter, as peft calls it.
        foundation: the base, which is needed.
        fresh: whether the layer was just made upon the base's weight, so that what it now holds instead, as
            KaSA does, belongs to the change.

    Raises:
        UpdateError: without a base, or if it has no such module.
    """
    if foundation.weights is None:
        raise UpdateError(f"{path}: {kind} is a change of given weights; give the base")
    names = [name for name in ("weight", "bias") if f"{path}.{name}" in foundation]
    if "weight" not in names:
        raise UpdateError(f"{path}.weight is not in {foundation.source}")
    if kind not in BIASED:
        names = ["weight"]
    elif kind == "BEFT":
        names = names[1:]
    if not names:
        raise UpdateError(f"{path}.bias is not in {foundation.source}, so that {kind} has nothing to change")
    for name in names:
        full = f"{path}.{name}"
        yield Change(
            name=full,
            shape=foundation.weights.shape(full),
            delta=partial(_merged, make, path, name, tuple(adapters), foundation, fresh),
            kind=kind.lower(),
            layout=foundation.weights.layout(full),
            needs_base=True,
            rounded=torch.float32,
        )


def _merged(
    make: Layer,
    path: str,
    name: str,
    adapters: tuple[str, ...],
    foundation: Foundation,
    fresh: bool,
    current: Read,
    start: Read,
) -> Tensor:
    layer = make()
    inner = layer.get_base_layer()
    before = current().clone()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for other, parameter in list(inner.named_parameters(recurse=False)):
            stored = foundation.stored(f"{path}.{other}").to(parameter.device)
            value = (before if other == name else wide(stored)).to(parameter.device)
            moved = fresh and not torch.equal(parameter, stored)
            parameter.data = value + (wide(parameter) - wide(stored)) if moved else value.clone()
        _widen(layer)
        try:
            layer.merge(adapter_names=list(adapters))
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as refused:
            raise UpdateError(f"{path}: peft does not merge this: {refused}") from refused
        return getattr(layer.get_base_layer(), name).detach().to(before) - before


def _widen(layer: nn.Module) -> None:
    """Half precision in float32; complex and whole numbers stay."""
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            value.data = wide(value.data)


def known(kind: str) -> tuple[str, bool]:
    """How peft begins the names of a kind's tensors, and whether its modules share some.

    Raises:
        UpdateError: for a kind that the installed peft does not know.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    known_kinds = {name.value: name for name in PEFT_TYPE_TO_TUNER_MAPPING}
    if kind not in known_kinds:
        raise UpdateError(f"{kind} is no kind that the installed peft knows; is a newer one needed?")
    name = known_kinds[kind]
    shares = bool(getattr(PEFT_TYPE_TO_TUNER_MAPPING[name], "uses_shared_state", False))
    return PEFT_TYPE_TO_PREFIX_MAPPING[name], shares or kind in SHARING


def sorted_out(
    tensors: Mapping[str, Stored], prefix: str
) -> tuple[list[str], dict[str, Stored], dict[str, Stored]]:
    """The adapted modules, the adapter's own tensors by their full names, and values stored whole.

    Tensors that all modules share have no module; they are the adapter's own, too.
    """
    paths: dict[str, None] = {}
    own, rest = {}, {}
    for name, stored in tensors.items():
        words = name.removeprefix(PREFIX).split(".")
        at = next((i for i in range(len(words) - 1, -1, -1) if words[i].startswith(prefix)), None)
        if at is None and not (name.startswith("base_model.") and not name.startswith(PREFIX)):
            rest[name.removeprefix(PREFIX)] = stored
            continue
        own[name] = stored
        if at is not None and name.startswith(PREFIX):
            paths[".".join(words[:at])] = None
    return list(paths), own, rest


class Rebuilt:
    """Layers of peft with a folder's adapter in them, made when they are asked for.

    One module at a time, unless the modules of a kind share tensors; these are made together and kept.

    Attributes:
        paths: of the adapted modules.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Stored],
        foundation: Foundation,
        paths: Collection[str],
        *,
        together: bool,
    ) -> None:
        self._settings = settings
        self._tensors = tensors
        self._foundation = foundation
        self._together = None
        self.paths = list(paths)
        if not together:
            return
        if foundation.module is not None:
            tree, targets = skeleton(foundation.module), None
        elif str(settings["peft_type"]) in ORDERED or settings.get("target_parameters") or not paths:
            raise UpdateError("the adapter depends on the order of the base's modules; give it as a module")
        else:
            tree, targets = _tree(paths, foundation), paths
        self._together = _loaded(tree, settings, tensors, targets)
        self.paths = [path for path, _ in layers(self._together)]

    def layers(self) -> Iterator[tuple[str, Any]]:
        """All layers, where they are made together, each with its module's path."""
        if self._together is not None:
            yield from layers(self._together)

    def layer(self, path: str) -> Any:
        """The layer of a module, which may be changed."""
        if self._together is not None:
            return copied(self._together.get_submodule(f"{PREFIX}{path}"))
        own = {name: held for name, held in self._tensors.items() if name.startswith(f"{PREFIX}{path}.")}
        model = _loaded(_tree([path], self._foundation), self._settings, own, [path])
        return model.get_submodule(f"{PREFIX}{path}")


def _tree(paths: Collection[str], foundation: Foundation) -> nn.Module:
    """A model of nothing but some modules of the base."""
    tree = nn.Module()
    for path in paths:
        _put(tree, path, module_at(path, foundation))
    return tree


def _loaded(
    model: nn.Module,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    targets: Collection[str] | None,
) -> nn.Module:
    """The model with the adapter put in by peft: at the given modules, or where the settings say.

    Raises:
        UpdateError: if tensors are missing, unknown or of another shape.
    """
    from peft import get_peft_model
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    kind = str(settings["peft_type"])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            tuned = get_peft_model(model, _config(settings, targets))
            expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
            _check(expected, tensors, kind)
            set_peft_model_state_dict(tuned, {name: stored.read() for name, stored in tensors.items()})
        except UpdateError:
            raise
        except (ValueError, RuntimeError, TypeError, KeyError, NotImplementedError) as refused:
            raise UpdateError(f"peft does not load this {kind} adapter: {refused}") from refused
    return tuned.eval()


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Stored], kind: str) -> None:
    missing = listed(sorted(name.removeprefix(PREFIX) for name in expected.keys() - tensors.keys()))
    unknown = listed(sorted(name.removeprefix(PREFIX) for name in tensors.keys() - expected.keys()))
    shapes = listed(
        sorted(
            f"{name.removeprefix(PREFIX)} ({tuple(tensors[name].shape)}, {tuple(value.shape)} for this base)"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        )
    )
    if missing or unknown or shapes:
        told = {"missing": missing, "not known to peft": unknown, "of another shape": shapes}
        raise UpdateError(
            f"a {kind} adapter that does not fit: "
            + "; ".join(f"{what}: {names}" for what, names in told.items() if names)
        )


def module_at(path: str, foundation: Foundation) -> nn.Module:
    """A module of the base, or one that is like it as far as its weights tell.

    Raises:
        UpdateError: if the base has no such module.
    """
    names = {name: f"{path}.{name}" for name in ("weight", "bias") if f"{path}.{name}" in foundation}
    if "weight" not in names or foundation.weights is None:
        raise UpdateError(f"{path}.weight is not in {foundation.source}")
    values = {
        name: nn.Parameter(foundation.stored(full), requires_grad=False) for name, full in names.items()
    }
    if foundation.module is not None:
        module = copy.copy(foundation.module.get_submodule(path))
    else:
        module = _like(values["weight"], foundation.weights.layout(names["weight"]), "bias" in values)
    module.__dict__["_parameters"] = dict.fromkeys(module._parameters) | values
    return module


def _like(weight: Tensor, layout: str, bias: bool) -> nn.Module:
    shape = weight.shape
    with torch.device("meta"):
        if layout == "in_out":
            from transformers.pytorch_utils import Conv1D

            return Conv1D(shape[1], shape[0])
        if len(shape) == 1:
            return nn.LayerNorm(shape[0])
        if layout == "other":
            return nn.Embedding(shape[0], shape[1])
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=bias)
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
        return kind(shape[1], shape[0], tuple(shape[2:]), bias=bias)


def _put(tree: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in tree._modules:
            tree.add_module(parent, nn.Module())
        tree = tree.get_submodule(parent)
    tree.add_module(name, module)


def _config(settings: Mapping[str, Any], targets: Collection[str] | None) -> Any:
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = {name.value: one for name, one in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[str(settings["peft_type"])]
    known = {field.name for field in fields(kind) if field.init}
    given = dict(settings)
    given |= dict.fromkeys(
        ("task_type", "base_model_name_or_path", "auto_mapping", "modules_to_save", "trainable_token_indices")
    )
    given |= {"bias": "none", "inference_mode": True, "progressbar": False}
    if targets is not None:
        given |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        given["target_modules"] = list(targets)
    return kind(**{name: value for name, value in given.items() if name in known and name != "peft_type"})
