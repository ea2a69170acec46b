"""Adam for LoRA: steps of the product B A, whatever its factors are."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.matrix_functions import polar, sym
from manifolds.operations import HALF
from manifolds.optim.adam import RiemannianAdam
from manifolds.optim.base import Entry
from manifolds.optim.lora_pairs import as_matrix, lora_pairs


class LowRankAdam(RiemannianAdam):
    """Adam on the products W = s·B A of LoRA adapters, as points of the matrices of rank at most r.

    Plain Adam moves B and A by themselves: its steps change when the same W is split otherwise, and are
    unbalanced as long as B is small. Here the step depends on W alone. With orthonormal bases U of the
    columns and V of the rows of W, and G the gradient by W (never formed: G V and Uᵀ G follow from the
    factors' gradients), per step

        M ← β₁ P(M) + (1 − β₁) P(G),        P(Z) = Z V Vᵀ + U Uᵀ Z − U Uᵀ Z V Vᵀ
        v ← β₂ v + (1 − β₂) ‖P(G)‖² / d,    d = (m + n − r) r
        D = P(orth N),                      N = β₁ M + (1 − β₁) P(G)
        W ← the nearest matrix of rank r to (1 − ηλ) W − η (‖M̂‖ / (v̂^½ + ε)) D / ‖D‖

    with M̂ and v̂ as corrected by Adam for their start. P projects onto the tangent space and carries the first
    moment from the old one; v is a number and needs no transport (`RiemannianAdam` says why it is one). N is
    the moment, looked ahead as by Nesterov. orth N is its orthogonal factor, where all singular values
    are one (those below √ε_machine of the largest, rounding mostly, are brought up in proportion and stay
    small): Adam gives the length of the step, Muon its direction. A gradient of LoRA lies mostly
    in very few singular directions, and a step along it overshoots there before the others have moved; one
    number per matrix cannot mend that as Adam's numbers per entry do. The nearest matrix is the projection
    retraction. QR decompositions of (m + n) × 2r entries are all it takes; nothing of size m × n is formed.

    In coordinates of the tangent space, d of them, a step that follows a steady gradient has entries of root
    mean square η. AdamW's η is a length for the entries of B and A, which W multiplies with each other: the
    two have no fixed ratio, so look for η anew. The benchmark `lora_almanac` compares the steps that both
    need; a smaller β₁ speeds AdamW up as well.

    At the start of LoRA B = 0: W has rank zero and is no point of the manifold of rank r. Nothing above
    needs it to be one. Where W has lost directions, U has them not, and Uᵀ G has no component there (the
    gradient by A is zero there, too); G V Vᵀ alone acts, with V from the rows of A. The first step therefore
    moves B and keeps the span of A's rows, and W has rank r from then on, as far as the gradient has. The
    nearest matrix of rank r is defined there, as the usual retractions are not. Directions that W loses
    later come back in the same way.

    In the model the factors are overwritten: A keeps orthogonal rows of equal length (its mean length
    before) that are turned as little as they can be, and B holds the rest. Half-precision factors have
    float32 copies in the state, from which they are rounded.

    Every other trainable parameter of the module (biases, DoRA's magnitudes, `modules_to_save`, pairs of
    which one is frozen) is in a second group and gets AdamW's steps, with `plain_lr`. `param_groups[0]`
    holds the pairs, as B and A in turn; groups can be given other options there.

    Args:
        module: a PEFT model, or any module with LoRA pairs; see `lora_pairs` for how they are found.
        lr: η, for the pairs; the root mean square of a step of W in coordinates of its tangent space.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled; shrinks W, and the plain parameters.
        plain_lr: learning rate of the other parameters.
        adapter: only the pairs of this adapter; other trainable parameters are plain.

    The other options are those of `RiemannianAdam`.

    Raises:
        ManifoldError: no pair is found; an option out of range; a sparse or non-finite gradient.

    Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013), for the geometry;
    Bogachev et al., "LoRA meets Riemannion" (2025), for orthogonal factors of moments there; Jordan et al.,
    "Muon" (2024).
    """

    tangents: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        plain_lr: float = 1e-3,
        adapter: str | None = None,
        **shared: Any,
    ) -> None:
        pairs = lora_pairs(module, adapter)
        if not pairs:
            which = "" if adapter is None else f" of the adapter {adapter!r}"
            raise ManifoldError(
                f"LowRankAdam: {type(module).__name__} has no trainable LoRA pair{which}; looked for "
                "submodules with lora_A and lora_B (or lora_embedding_A and lora_embedding_B) whose weights "
                "of shapes (r, in) and (out, r), r at most in and out, both require gradients"
            )
        factors = [(f"{p.name}.{side}", f) for p in pairs for side, f in (("B", p.left), ("A", p.right))]
        taken = {id(factor) for _, factor in factors}
        others = [(n, p) for n, p in module.named_parameters() if p.requires_grad and id(p) not in taken]
        groups: list[dict[str, Any]] = [{"params": factors, "scalings": tuple(p.scaling for p in pairs)}]
        if others:
            groups.append({"params": others, "scalings": None, "lr": plain_lr})
        super().__init__(groups, lr, betas, eps, weight_decay, decoupled_weight_decay=True, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        group.setdefault("scalings", None)
        if group["scalings"] is None:
            return
        if group["amsgrad"]:
            raise ManifoldError(
                "LowRankAdam: amsgrad is not possible for pairs: use it on plain parameters only"
            )
        if group["stabilize"] is not None:
            raise ManifoldError(
                "LowRankAdam: stabilize is not needed for pairs: every step ends at a product of rank r"
            )

    # The step, for a group of pairs

    def _batches(self, entries: list[Entry]) -> list[list[Entry]]:
        """Pairs of equal shape, dtype, device and age together, each as B and A in turn; others as ever."""
        if not entries or entries[0].group["scalings"] is None:
            return super()._batches(entries)
        group = entries[0].group
        named = {id(e.parameter): e for e in self._entries(group, 0)}
        active = {id(entry.parameter) for entry in entries}
        found: dict[Any, list[Entry]] = {}
        for index, (left, right) in enumerate(zip(group["params"][::2], group["params"][1::2], strict=True)):
            if not {id(left), id(right)} & active:
                continue
            age = self.state[left].get("step", 0) if left in self.state else 0
            key: tuple[Any, ...] = (left.shape, right.shape, left.dtype, left.device, age)
            key = (*key, index) if group["foreach"] is False else key
            found.setdefault(key, []).extend((named[id(left)], named[id(right)]))
        return list(found.values())

    def _clip(self, entries: list[Entry]) -> Tensor | None:
        group = entries[0].group
        if group["scalings"] is None or group["max_norm"] is None:
            return super()._clip(entries)
        squares = []
        for batch in self._batches(entries):
            left, right, of_left, of_right, scaling = self._read(batch)
            u, _, x, y = frames(left, right, of_left, of_right, scaling)
            squares.append(tangent_square(u, x, y).double().sum())
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().clamp_min(0).sqrt()
        return (group["max_norm"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1.0)

    def _read(self, batch: list[Entry]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The factors, their gradients and the scalings of a batch of pairs, stacked."""
        group = batch[0].group
        places = {id(p): i // 2 for i, p in enumerate(group["params"])}

        def values(entry: Entry) -> Tensor:
            copy = self.state[entry.parameter].get("copy") if entry.parameter in self.state else None
            return as_matrix(entry.point if copy is None else copy)

        def gradient(entry: Entry) -> Tensor:
            missing = entry.parameter.grad is None
            return as_matrix(torch.zeros_like(entry.point) if missing else entry.gradient)

        lefts, rights = batch[::2], batch[1::2]
        left, right = (torch.stack([values(e) for e in side]) for side in (lefts, rights))
        of_left, of_right = (torch.stack([gradient(e) for e in side]) for side in (lefts, rights))
        scaling = left.new_tensor([group["scalings"][places[id(e.parameter)]] for e in lefts])[:, None, None]
        return left, right, of_left, of_right, scaling

    def _step_batch(self, batch: list[Entry], scale: Tensor | None) -> None:
        group = batch[0].group
        if group["scalings"] is None:
            return super()._step_batch(batch, scale)
        left, right, of_left, of_right, scaling = self._read(batch)
        if scale is not None:
            of_left, of_right = of_left * scale.to(of_left), of_right * scale.to(of_right)
        states = [self.state[entry.parameter] for entry in batch]
        for entry, state in zip(batch, states, strict=True):
            if not state:
                state.update(self._start_factor(entry))
        step = states[0]["step"] + 1
        kept = [
            {k: torch.stack([s[k] for s in side]) for k in MOMENTS} for side in (states[::2], states[1::2])
        ]
        left, right, *new = pair_step(
            (left, right), (of_left, of_right), (kept[0], kept[1]), scaling, step, group
        )
        for factors, moments, entries in ((left, new[0], batch[::2]), (right, new[1], batch[1::2])):
            for index, entry in enumerate(entries):
                state = self.state[entry.parameter]
                state["step"] = step
                for name in MOMENTS:
                    state[name].copy_(moments[name][index])
                if "copy" in state:
                    state["copy"].copy_(factors[index].reshape(state["copy"].shape))
                plain(entry.parameter.detach()).copy_(factors[index].reshape(entry.parameter.shape))

    def _start_factor(self, entry: Entry) -> dict[str, Any]:
        x = entry.point
        matrix = as_matrix(x)
        parameters = entry.group["params"]
        on_left = any(p is entry.parameter for p in parameters[::2])
        tall = matrix if on_left else matrix.mT
        state = {"step": 0, "exp_avg": torch.zeros_like(tall), "frame": torch.zeros_like(tall)}
        state["exp_avg_sq"] = x.new_zeros(1, 1)
        return {**state, "copy": x.clone()} if entry.parameter.dtype in HALF else state


MOMENTS = ("exp_avg", "exp_avg_sq", "frame")


def pair_step(
    factors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    states: tuple[dict[str, Tensor], dict[str, Tensor]],
    scaling: Tensor,
    step: int,
    group: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The next factors B and A, and the states of both sides, for a batch of pairs. See `LowRankAdam`.

    A tangent matrix is kept as X = M V and Y = Mᵀ U, with M = X Vᵀ + U Yᵀ − U (UᵀX) Vᵀ, beside its frames
    U and V.
    """
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    left, right = factors
    u, v, x, y = frames(left, right, *gradients, scaling)
    old_x, old_y = carry(states, u, v)
    moment_x, moment_y = torch.lerp(old_x, x, 1 - beta1), torch.lerp(old_y, y, 1 - beta1)
    rank = left.shape[-1]
    dimension = (left.shape[-2] + right.shape[-1] - rank) * rank
    square = torch.lerp(states[0]["exp_avg_sq"], tangent_square(u, x, y) / dimension, 1 - beta2)
    root = square.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
    ahead_x, ahead_y = torch.lerp(x, moment_x, beta1), torch.lerp(y, moment_y, beta1)
    # From here on in orthonormal bases of the columns and rows that W and the moment have together
    columns, of_columns = torch.linalg.qr(torch.cat([u, ahead_x], -1))
    rows, of_rows = torch.linalg.qr(torch.cat([ahead_y - v @ (u.mT @ ahead_x).mT, v], -1))
    ahead = of_columns @ of_rows.mT
    inner_u, inner_v = of_columns[..., :rank], of_rows[..., rank:]
    whole = orthogonal_factor(ahead)
    way = whole @ inner_v @ inner_v.mT
    way = way + inner_u @ (inner_u.mT @ (whole - way))
    size = torch.linalg.matrix_norm(way, keepdim=True)
    length = tangent_square(u, moment_x, moment_y).sqrt() / (1 - beta1**step) / root
    length = length / torch.where(size > 0, size, 1.0)
    point = (columns.mT @ left) @ (right @ v) @ inner_v.mT * scaling
    new_u, values, new_vt = torch.linalg.svd(
        point * (1 - lr * group["weight_decay"]) - lr * length * way, full_matrices=False
    )
    new_u, values, new_v = columns @ new_u[..., :rank], values[..., :rank], rows @ new_vt.mT[..., :rank]
    turn = polar(new_v.mT @ v)
    of_a = torch.linalg.matrix_norm(right, keepdim=True) / math.sqrt(rank)
    of_a = torch.where(of_a > 0, of_a, 1.0)
    new_left = (new_u * values.unsqueeze(-2)) @ turn / (of_a * scaling)
    new_right = (new_v @ turn).mT * of_a
    sides = (
        {"exp_avg": moment_x, "exp_avg_sq": square, "frame": u},
        {"exp_avg": moment_y, "exp_avg_sq": square, "frame": v},
    )
    return new_left, new_right, *sides


def carry(states: tuple[dict[str, Tensor], dict[str, Tensor]], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """M V and MᵀU of the tangent matrix M in the states, by frames U and V that may be new."""
    (old_x, old_u), (old_y, old_v) = ((side["exp_avg"], side["frame"]) for side in states)
    turn_u, turn_v, within = old_u.mT @ u, old_v.mT @ v, old_u.mT @ old_x
    carried_x = old_x @ turn_v + old_u @ (old_y.mT @ v - within @ turn_v)
    carried_y = old_y @ turn_u + old_v @ (old_x.mT @ u - within.mT @ turn_u)
    return carried_x, carried_y


def orthogonal_factor(matrix: Float[Tensor, "*batch k l"]) -> Float[Tensor, "*batch k l"]:
    """The matrix with all its singular values brought to one.

    Those below √ε of the largest become their ratio to that bound, so that the result is continuous and
    rounding does not grow to a step.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    floor = values[..., :1] * math.sqrt(torch.finfo(values.dtype).eps)
    weights = values / torch.where(floor > 0, values.clamp_min(floor), 1.0)
    return left * weights.unsqueeze(-2) @ right


def tangent_square(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """‖M‖² of a tangent matrix with M V = X and MᵀU = Y (*batch, 1, 1)."""
    sizes = [part.square().sum((-2, -1), keepdim=True) for part in (x, y, u.mT @ x)]
    return (sizes[0] + sizes[1] - sizes[2]).clamp_min(0)


def frames(
    left: Float[Tensor, "*batch m r"], right: Float[Tensor, "*batch r n"],
    of_left: Float[Tensor, "*batch m r"], of_right: Float[Tensor, "*batch r n"],
    scaling: Float[Tensor, "*batch 1 1"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """U, V, X = G V, and Gᵀ U, from the factors of s·B A and their gradients s·G Aᵀ and s·Bᵀ G.

    U = B (BᵀB)^(−½) and V = Aᵀ (A Aᵀ)^(−½), with zero columns where a factor has lost rank.
    """
    inverse_left, inverse_right = range_root(left.mT @ left), range_root(right @ right.mT)
    u, v = left @ inverse_left, right.mT @ inverse_right
    return u, v, of_left @ inverse_right / scaling, of_right.mT @ inverse_left / scaling


def range_root(gram: Float[Tensor, "*batch r r"]) -> Float[Tensor, "*batch r r"]:
    """The inverse square root of a positive semidefinite matrix on its range, zero beside it."""
    values, basis = torch.linalg.eigh(sym(gram))
    cut = values[..., -1:] * (values.shape[-1] * torch.finfo(values.dtype).eps)
    kept = values > cut.clamp_min(torch.finfo(values.dtype).tiny)
    weights = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    return (basis * weights.unsqueeze(-2)) @ basis.mT
