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

    Plain Adam moves B and A by themselves: its steps change when the same W is split otherwise, and are unbalanced as
    long as B is small. Here the step depends on W alone. With orthonormal bases U of the columns and V of the rows of W,
    and G the gradient by W (never formed: G V and Uᵀ G follow from the factors' gradients), per step

        M ← β₁ P(M) + (1 − β₁) P(G)             the first moment, a tangent matrix U·Y + X·Vᵀ − U·Uᵀ X·Vᵀ, carried by
                                                orthogonal projection P onto the present tangent space;
        S ← β₂ S + (1 − β₂) (G V)ᵀ(G V) / m      the second moment of X = G V in the row space, r×r, and the same for
        Z ← β₂ Z + (1 − β₂) (Uᵀ G)(Uᵀ G)ᵀ / n    Y = Uᵀ G in the column space; both carried by the rotation of the
                                                bases that is nearest to V_oldᵀ V_new (an isometric transport);
        D = (I − ½ U Uᵀ) X S^(−½) Vᵀ + U Z^(−½) Y (I − ½ V Vᵀ)     (moments with Adam's corrections for their start);
        W ← the nearest matrix of rank r to (1 − ηλ) W − ηD.

    S plays the part of Adam's mean squares, without coordinates: an entry per direction would depend on the basis,
    an r×r matrix turns with it. The entries of D are of size one, as Adam's are, so that η is comparable with AdamW's.
    The nearest matrix is the projection retraction of fixed rank, from QR decompositions of (m + n) × 2r entries.

    At the start of LoRA B = 0: W has rank zero and is no point of the manifold of rank r. Nothing above needs it to be
    one: where W has lost directions, U has them not, Y has no component there (the gradient by A is zero there, too), and
    X Vᵀ alone acts. The first step therefore moves B and leaves the rows of A, and as S whitens it, W has well-conditioned
    rank r from then on, as far as the gradient has. The nearest matrix of rank r is defined there, as ordinary
    retractions are not.

    In the model the factors are overwritten: A keeps orthogonal rows of equal length (its mean length before) that are
    turned as little as they can be, and B holds the rest. Half-precision factors have float32 copies in the state, from
    which they are rounded.

    Every other trainable parameter of the module (biases, DoRA's magnitudes, `modules_to_save`, pairs of which one is
    frozen) is in a second group and gets AdamW's steps, with `plain_lr`. `param_groups[0]` holds the pairs, as B and A
    in turn; groups can be given other options there.

    Args:
        module: a PEFT model, or any module with LoRA pairs; see `lora_pairs` for how they are found.
        lr: η, for the pairs; about the size of the entries of a step of W.
        betas: β₁ and β₂.
        eps: of the plain parameters, as in AdamW.
        weight_decay: λ, decoupled; shrinks W, and the plain parameters.
        damping: the share of its largest eigenvalue that is added to S and Z before their inverse roots.
        plain_lr: learning rate of the other parameters.
        adapter: only the pairs of this adapter; other trainable parameters are plain.

    The other options are those of `RiemannianAdam`.

    Raises:
        ManifoldError: no pair is found; an option out of range; a sparse or non-finite gradient.

    Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013), for the geometry; Yen et al.,
    "LoRA Done RITE" (2025), for second moments that turn with the basis; Zhang and Pilanci, "Riemannian Preconditioned
    LoRA" (2024).
    """

    tangents: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        damping: float = 1e-6,
        plain_lr: float = 1e-3,
        adapter: str | None = None,
        **shared: Any,
    ) -> None:
        pairs = lora_pairs(module, adapter)
        if not pairs:
            which = "" if adapter is None else f" of the adapter {adapter!r}"
            raise ManifoldError(
                f"LowRankAdam: {type(module).__name__} has no trainable LoRA pair{which}; looked for submodules with lora_A and "
                "lora_B (or lora_embedding_A and lora_embedding_B) whose weights of shapes (r, in) and (out, r) both "
                "require gradients"
            )
        if not 0 < damping < 1:
            raise ManifoldError(f"LowRankAdam: damping is {damping}; it is a number between 0 and 1")
        factors = [(f"{p.name}.{side}", f) for p in pairs for side, f in (("B", p.left), ("A", p.right))]
        taken = {id(factor) for _, factor in factors}
        others = [(n, p) for n, p in module.named_parameters() if p.requires_grad and id(p) not in taken]
        groups = [{"params": factors, "scalings": tuple(p.scaling for p in pairs), "damping": damping}]
        if others:
            groups.append({"params": others, "scalings": None, "damping": None, "lr": plain_lr})
        super().__init__(
            groups, lr, betas, eps, weight_decay, decoupled_weight_decay=True, **shared
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        group.setdefault("scalings", None)
        if group["scalings"] is None:
            return
        if group["amsgrad"]:
            raise ManifoldError("LowRankAdam: amsgrad is not possible for pairs: their second moments are not ordered")
        if group["stabilize"] is not None:
            raise ManifoldError("LowRankAdam: stabilize is not needed for pairs: every step ends at a product of rank r")

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
            key = (left.shape, right.shape, left.dtype, left.device, age)
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
            u, v, x, y = frames(left, right, of_left, of_right, scaling)[:4]
            squares.append((x.square().sum() + y.square().sum() - (u.mT @ x).square().sum()).double())
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
        kept = [{k: torch.stack([s[k] for s in side]) for k in MOMENTS} for side in (states[::2], states[1::2])]
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
        rank = tall.shape[-1]
        zeros = {"exp_avg": torch.zeros_like(tall), "frame": torch.zeros_like(tall)}
        state = {"step": 0, **zeros, "exp_avg_sq": x.new_zeros(rank, rank)}
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
    """The next factors B and A, and the states of both sides, for a batch of pairs. See `LowRankAdam`."""
    (beta1, beta2), lr, damping = group["betas"], float(group["lr"]), group["damping"]
    left, right = factors
    u, v, x, y, root = frames(left, right, *gradients, scaling)
    old_u, old_v = states[0]["frame"], states[1]["frame"]
    moment_x, moment_y = states[0]["exp_avg"], states[1]["exp_avg"]
    turn_u, turn_v = old_u.mT @ u, old_v.mT @ v
    inside = old_u.mT @ moment_x
    core = moment_y.mT @ v - inside @ turn_v
    carried_x = moment_x @ turn_v + old_u @ core
    carried_y = moment_y @ turn_u + old_v @ ((u.mT @ moment_x).mT - inside.mT @ turn_u)
    moment_x = torch.lerp(carried_x, x, 1 - beta1)
    moment_y = torch.lerp(carried_y, y, 1 - beta1)
    squares = []
    for state, turn, now in ((states[1], turn_v, x), (states[0], turn_u, y)):
        rotation = nearest_rotation(turn)
        carried = rotation.mT @ state["exp_avg_sq"] @ rotation
        squares.append(torch.lerp(carried, now.mT @ now / now.shape[-2], 1 - beta2))
    first, second = 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    d_x, d_y = (
        (moment @ inverse_root(square, damping)) * (first / second)
        for moment, square in ((moment_x, squares[0]), (moment_y, squares[1]))
    )
    d_x = d_x - u @ (u.mT @ d_x) / 2
    d_y = d_y - v @ (v.mT @ d_y) / 2
    shrink = 1 - lr * group["weight_decay"]
    tall = torch.cat([left @ (right @ v) * (scaling * shrink) - lr * d_x, u], -1)
    wide = torch.cat([v, -lr * d_y], -1)
    new_u, values, new_v = top_svd(tall, wide, left.shape[-1])
    rotation = nearest_rotation(new_v.mT @ v)
    length = torch.linalg.matrix_norm(right, keepdim=True) / math.sqrt(right.shape[-2])
    length = torch.where(length > 0, length, 1.0)
    new_left = (new_u * values.unsqueeze(-2)) @ rotation / (length * scaling)
    new_right = (new_v @ rotation).mT * length
    sides = (
        {"exp_avg": moment_x, "exp_avg_sq": squares[1], "frame": u},
        {"exp_avg": moment_y, "exp_avg_sq": squares[0], "frame": v},
    )
    return new_left, new_right, *sides


def frames(
    left: Float[Tensor, "*batch m r"], right: Float[Tensor, "*batch r n"],
    of_left: Float[Tensor, "*batch m r"], of_right: Float[Tensor, "*batch r n"],
    scaling: Float[Tensor, "*batch 1 1"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """U, V, X = G V, Yᵀ = Gᵀ U and (A Aᵀ)^½, from the factors of s·B A and their gradients s·G Aᵀ and s·Bᵀ G.

    U = B (BᵀB)^(−½) and V = Aᵀ (A Aᵀ)^(−½), with zero columns where a factor has lost rank.
    """
    inverse_left, _ = roots(left.mT @ left)
    inverse_right, root = roots(right @ right.mT)
    u, v = left @ inverse_left, right.mT @ inverse_right
    return u, v, of_left @ inverse_right / scaling, of_right.mT @ inverse_left / scaling, root


def roots(gram: Float[Tensor, "*batch r r"]) -> tuple[Tensor, Tensor]:
    """The inverse square root on the range of a positive semidefinite matrix, and its square root."""
    values, basis = torch.linalg.eigh(sym(gram))
    cut = values[..., -1:] * (values.shape[-1] * torch.finfo(values.dtype).eps)
    kept = values > cut.clamp_min(torch.finfo(values.dtype).tiny)
    safe = torch.where(kept, values, 1.0)
    weights = torch.where(kept, safe.rsqrt(), 0.0), torch.where(kept, safe.sqrt(), 0.0)
    inverse, root = ((basis * w.unsqueeze(-2)) @ basis.mT for w in weights)
    return inverse, root


def inverse_root(gram: Float[Tensor, "*batch r r"], damping: float) -> Float[Tensor, "*batch r r"]:
    """(S + δ λ_max I)^(−½); zero where S is."""
    values, basis = torch.linalg.eigh(sym(gram))
    largest = values[..., -1:]
    raised = values.clamp_min(0) + damping * largest
    usable = raised > torch.finfo(values.dtype).tiny
    weights = torch.where(usable, torch.where(usable, raised, 1.0).rsqrt(), 0.0)
    return (basis * weights.unsqueeze(-2)) @ basis.mT


def nearest_rotation(turn: Float[Tensor, "*batch r r"]) -> Float[Tensor, "*batch r r"]:
    """The orthogonal matrix nearest to the product of two bases."""
    return polar(turn)


def top_svd(
    left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch n k"], rank: int
) -> tuple[Float[Tensor, "*batch m r"], Float[Tensor, "*batch r"], Float[Tensor, "*batch n r"]]:
    """The first singular vectors and values of left · rightᵀ, by QR of the factors."""
    q1, t1 = torch.linalg.qr(left)
    q2, t2 = torch.linalg.qr(right)
    u, values, vt = torch.linalg.svd(t1 @ t2.mT, full_matrices=False)
    return q1 @ u[..., :rank], values[..., :rank], q2 @ vt.mT[..., :rank]
