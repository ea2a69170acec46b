"""What the Riemannian optimizers share: where parameters live, equal ones in one batch, checks before a step.

A subclass gives `_advance`, a function of one batch of points. Everything around it is written once here:
closures, parameter groups, the checks of gradients, clipping, stacking, writing back, and saving to the bit.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import geoopt
import torch
from geoopt import ManifoldTensor
from torch import Tensor

from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.operations import HALF, OPERATION_TOLERANCE, unchecked, widened
from manifolds.optim.gradients import clip_scale, refuse_nonfinite

log = logging.getLogger(__name__)
LINE = geoopt.Euclidean(ndim=0)
"""Where plain tensors live: every entry is a point of the real line, so that a scalar per point is one per
entry."""
STACK_LIMIT = 2**24
"""The most entries that one stacked batch holds; larger ones are cut, so that the copies stay small."""
BLOCK = 2**17
"""How many entries of a batch are stepped at a time on a CPU."""
IMPOSSIBLE = {
    "capturable": "the check of the gradients reads a number back from the device, which no graph can record",
    "differentiable": "steps are taken in place and leave no graph; see manifolds.minimize",
    "fused": "no kernel is there for steps on manifolds; foreach stacks equal parameters",
}


@dataclass(frozen=True)
class Entry:
    """One parameter that has a gradient: its manifold, its group and what messages call it."""

    parameter: Tensor
    manifold: Any
    group: dict[str, Any]
    name: str

    @property
    def point(self) -> Tensor:
        """The parameter's values, without geoopt's mark; half precision in float32."""
        return widened(plain(self.parameter.detach()))

    @property
    def grad(self) -> Tensor:
        """What lies in the parameter's `grad`."""
        if self.parameter.grad is None:
            raise ManifoldError(f"parameter {self.name} has no gradient; call backward() first")
        return self.parameter.grad

    @property
    def gradient(self) -> Tensor:
        """The gradient of the loss to minimise; half precision in float32."""
        gradient = widened(plain(self.grad.detach()))
        return -gradient if self.group["maximize"] else gradient


class RiemannianOptimizer(torch.optim.Optimizer):
    """The base of the optimizers here; see `RiemannianAdam` for the options that all of them share."""

    tangents: ClassVar[tuple[str, ...]] = ()
    """The names of the states that are tangent vectors."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        stabilize: int | None = None,
        max_norm: float | None = None,
        nonfinite: str = "raise",
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        shared = {
            "maximize": maximize, "foreach": foreach, "stabilize": stabilize, "max_norm": max_norm,
            "nonfinite": nonfinite, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        }  # fmt: skip
        super().__init__(params, {**defaults, **shared})

    # What a subclass says of itself

    def _check_options(self, group: dict[str, Any]) -> None:
        """Refuses options that mean nothing. Subclasses add their own."""
        name = type(self).__name__
        for flag, reason in IMPOSSIBLE.items():
            if group[flag]:
                raise ManifoldError(f"{name}: {flag}={group[flag]} is not possible: {reason}")
        if group["nonfinite"] not in ("raise", "skip"):
            raise ManifoldError(f"{name}: nonfinite is {group['nonfinite']!r}; it is 'raise' or 'skip'")
        self._require(group, "lr", lambda value: value >= 0 and math.isfinite(value), "a finite number ≥ 0")
        if group["stabilize"] is not None:
            self._require(group, "stabilize", lambda k: k >= 1 and k == int(k), "a whole number ≥ 1 or None")
        if group["max_norm"] is not None:
            self._require(group, "max_norm", lambda value: value > 0, "a number > 0 or None")

    def _check_parameter(self, entry: Entry) -> None:
        """Refuses a parameter that this optimizer has no step for."""

    def _start(self, entry: Entry) -> dict[str, Any]:
        """The state of a parameter before its first step, without `step`."""
        raise NotImplementedError

    def _advance(
        self, manifold: Any, x: Tensor, g: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next points and states of one batch, from points, Euclidean gradients and states."""
        raise NotImplementedError

    # torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; points off their manifold raise `ManifoldError`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            for entry in self._entries(group, len(self.param_groups) - 1):
                self._check_point(entry)
                self._check_parameter(entry)
        except ManifoldError:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew and fills the gradients; its value is returned.

        Raises:
            ManifoldError: a closure's loss that is no scalar, a sparse gradient, or one that is not finite
                (the parameter is named; nothing has been changed).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise ManifoldError(
                    f"{type(self).__name__}.step: the closure returned shape {tuple(loss.shape)}; "
                    "it returns one number"
                )
        with torch.no_grad(), unchecked():
            for entries, scale in self._ready():
                for batch in self._batches(entries):
                    self._step_batch(batch, scale)
        return loss

    @torch.no_grad()
    def stabilize(self) -> None:
        """Puts every parameter on its manifold and its moments into the tangent space, to mend rounding."""
        with unchecked():
            for number, group in enumerate(self.param_groups):
                for entry in self._entries(group, number):
                    x = entry.manifold.projx(entry.point)
                    entry.parameter.copy_(x)
                    state = self.state.get(entry.parameter, {})
                    for key in set(self.tangents) & state.keys():
                        state[key].copy_(entry.manifold.proju(x, state[key]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, to the bit; states keep their own dtype."""
        found: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, given: found.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for saved, group in zip(found["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                for name, value in found["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.detach().clone().to(parameter.device)

    # The step

    def _entries(self, group: dict[str, Any], number: int) -> Iterator[Entry]:
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            name = names[index] if names else f"{index} of group {number}"
            manifold = parameter.manifold if isinstance(parameter, ManifoldTensor) else LINE
            yield Entry(parameter, manifold, group, name)

    def _ready(self) -> list[tuple[list[Entry], Tensor | None]]:
        """The parameters with gradients, group by group, checked, with the factor that clips them."""
        ready = []
        for number, group in enumerate(self.param_groups):
            entries = [e for e in self._entries(group, number) if e.parameter.grad is not None]
            for entry in entries:
                if entry.grad.layout != torch.strided:
                    raise ManifoldError(
                        f"{type(self).__name__}: the gradient of {entry.name} is sparse; "
                        "steps move whole points: ask the layer for dense gradients (sparse=False)"
                    )
            ready.append(entries)
        bad = refuse_nonfinite([(e.name, e.grad) for entries in ready for e in entries])
        kept = []
        for entries in ready:
            named = [entry.name for entry in entries if entry.name in bad]
            if named and entries[0].group["nonfinite"] == "raise":
                raise ManifoldError(
                    f"{type(self).__name__}: the gradient of parameter {named[0]} "
                    f"is not finite ({bad[named[0]]} entries); "
                    "nothing was changed. nonfinite='skip' leaves out such a step of the group"
                )
            if named:
                log.warning(
                    "%s: a step is left out: the gradient of %s is not finite", type(self).__name__, named
                )
            elif entries:
                kept.append(entries)
        return [(entries, self._clip(entries)) for entries in kept]

    def _clip(self, entries: list[Entry]) -> Tensor | None:
        limit = entries[0].group["max_norm"]
        if limit is None:
            return None
        return clip_scale([(e.manifold, e.point, e.gradient) for e in entries], limit)[1]

    def _batches(self, entries: list[Entry]) -> list[list[Entry]]:
        """Parameters of equal shape, dtype, device, manifold and age together; alone without `foreach`."""
        if not entries or entries[0].group["foreach"] is False:
            return [[entry] for entry in entries]
        found: dict[Any, list[list[Entry]]] = {}
        for entry in entries:
            p = entry.parameter
            age = self.state[p].get("step", 0) if p in self.state else 0
            key = (p.shape, p.dtype, p.device, p.grad.dtype, same_manifold(entry.manifold), age)  # type: ignore[union-attr]
            lists = found.setdefault(key, [[]])
            if lists[-1] and (len(lists[-1]) + 1) * p.numel() > STACK_LIMIT:
                lists.append([])
            lists[-1].append(entry)
        return [batch for lists in found.values() for batch in lists]

    def _step_batch(self, batch: list[Entry], scale: Tensor | None) -> None:
        states = [self.state[entry.parameter] for entry in batch]
        for entry, state in zip(batch, states, strict=True):
            if not state:
                state["step"] = 0
                state.update(self._start(entry))
        step = states[0]["step"] + 1
        group, manifold = batch[0].group, batch[0].manifold
        names = [name for name, value in states[0].items() if isinstance(value, Tensor)]
        x = _stacked([entry.point for entry in batch])
        g = _stacked([entry.gradient for entry in batch])
        if scale is not None:
            g = g * scale.to(g)
        kept = {name: _stacked([state[name] for state in states]) for name in names}
        mend = group["stabilize"] is not None and step % group["stabilize"] == 0
        for part in self._blocks(manifold, x):
            old = {name: value[part] for name, value in kept.items()}
            y, new = self._advance(manifold, x[part], g[part], old, step, group)
            if mend:
                y = manifold.projx(y)
                new = {k: manifold.proju(y, v) if k in self.tangents else v for k, v in new.items()}
            x[part].copy_(y)
            for name in names:
                kept[name][part].copy_(new[name])
        _write([entry.parameter for entry in batch], x)
        for name in names:
            _write([state[name] for state in states], kept[name])
        for state in states:
            state["step"] = step

    def _blocks(self, manifold: Any, x: Tensor) -> list[Any]:
        """Slices of a batch that are stepped one after the other: on a CPU, what fits its cache.

        A step passes over its tensors some ten times; a block stays in the cache for all of them.
        """
        if x.device.type != "cpu" or x.ndim <= self._point_dims(manifold) or x.numel() <= BLOCK:
            return [...]
        count = max(1, BLOCK * x.shape[0] // x.numel())
        return [slice(start, start + count) for start in range(0, x.shape[0], count)]

    def _point_dims(self, manifold: Any) -> int:
        """How many trailing dimensions are stepped together."""
        return int(manifold.ndim)

    # Checks

    def _check_point(self, entry: Entry) -> None:
        parameter, name = entry.parameter, type(self).__name__
        if not parameter.is_floating_point():
            raise ManifoldError(
                f"{name}: parameter {entry.name} has dtype {parameter.dtype}; points are "
                "real floating-point tensors (view a complex one as real)"
            )
        if entry.manifold is LINE:
            return
        x, limit = entry.point, 3e-2 if parameter.dtype in HALF else OPERATION_TOLERANCE
        shaped = entry.manifold._check_shape(x.shape, "x")
        ok, reason = shaped if isinstance(shaped, tuple) else (shaped, "its shape does not fit")
        if ok:
            ok, reason = entry.manifold._check_point_on_manifold(x, atol=limit, rtol=limit)
        if ok and not bool(x.isfinite().all()):
            ok, reason = False, "it has entries that are not finite"
        if not ok:
            raise ManifoldError(
                f"{name}: parameter {entry.name} is not on {entry.manifold}: {reason}; put it there with "
                "parameter.proj_(), or start from manifold.projx(x)"
            )

    def _require(self, group: dict[str, Any], key: str, holds: Callable[[Any], bool], meant: str) -> None:
        if not holds(group[key]):
            raise ManifoldError(f"{type(self).__name__}: {key} is {group[key]}; it is {meant}")


def same_manifold(manifold: Any) -> Any:
    """A key that two manifolds share only if they are the same: by class and settings, or by identity."""
    learned = list(manifold.parameters()) or list(manifold.buffers()) or list(manifold.children())
    settings = {k: v for k, v in vars(manifold).items() if not k.startswith("_") and k != "training"}
    told = all(isinstance(v, bool | int | float | str | tuple | type(None)) for v in settings.values())
    if learned or not told or any(k for k in vars(manifold) if k.startswith("_") and k not in _MODULE):
        return id(manifold)
    return (type(manifold), *sorted(settings.items()))


def decay(group: dict[str, Any], x: Tensor, g: Tensor) -> Tensor:
    """The gradient with that of λ/2 ‖x‖² added."""
    return g.add(x, alpha=group["weight_decay"]) if group["weight_decay"] else g


_MODULE = frozenset(vars(torch.nn.Module()))


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _write(targets: list[Tensor], values: Tensor) -> None:
    parts: Iterable[Tensor] = [values] if len(targets) == 1 else values.unbind(0)
    for target, part in zip(targets, parts, strict=True):
        if target.data_ptr() != part.data_ptr() or target.dtype != part.dtype:
            target.copy_(part)
