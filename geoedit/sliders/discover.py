"""Sliders that nobody named: the directions in a denoiser's bottleneck that change its pictures most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bottleneck import find_bottleneck, shifted, stream_of
from geoedit.sliders.training.direction import Direction, pool, trajectories
from geoedit.sliders.training.regression import encoded
from manifolds import Pullback
from manifolds.forward_mode import WrittenOut


@torch.no_grad()
def discover(
    pipe: Any,
    *,
    prompts: Sequence[str] = ("",),
    count: int = 4,
    metric: str = "output",
    at: float = 0.4,
    samples: int = 16,
    steps: int = 20,
    guidance: float = 3.0,
    pooled: bool = True,
    effect: float = 0.25,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> list[Direction]:
    r"""The top singular directions of the pullback metric at the bottleneck, the strongest first.

    Trajectories are drawn and stopped at one time; from there the map is one pass of the denoiser.

    With ``metric="output"`` the clean latents \(\hat x_i(h_i + \delta)\) that it predicts are functions of a
    change \(\delta\) of its bottleneck, the same for all samples i, and the metric is the mean of
    \(J_i^\top J_i\): the directions are those that change all pictures most, for an equal step.

    With ``metric="bottleneck"`` (Park et al. 2023) the bottleneck is a function of the latents at that time,
    and its metric is pulled back to these: each sample has directions of its own, whose images
    in the bottleneck, as long as their singular values, are summed up by their principal components.

    Either way a direction's length is chosen so that scale 1 changes the predicted clean latents, to first
    order, by `effect` times their standard deviation; but is no longer than the stream itself, far beyond
    which no derivative tells of anything (``details["effect"]`` says what is left). `train` makes a slider
    of one: ``SliderSpec(direction=found[0])``.

    Args:
        pipe: a pipeline.
        prompts: of the samples, taken in turn.
        count: how many directions.
        metric: see above.
        at: where the trajectories are stopped, as a share of the sampling: 0 is pure noise.
        samples: how many trajectories.
        steps: their steps.
        guidance: theirs.
        pooled: only directions that are alike at all places of the bottleneck: they say what is drawn, not
            where.
        effect: of scale 1, as above.
        tolerance: of the angle to the exact space of directions, in radians.
        generator: draws the noise; seed 0 if not given.

    Raises:
        EditError: a share outside [0, 1), more directions than the bottleneck has, a pipeline without one, or
            a bottleneck that changes nothing.

    Source: Park et al., "Understanding the latent space of diffusion models through the lens of Riemannian
    geometry" (2023); Kwon et al., "Diffusion models already have a semantic latent space" (2023).
    """
    if not 0 <= at < 1:
        raise EditError(f"at is {at}; it is a share of the sampling from 0 (noise) to below 1.")
    if metric not in ("output", "bottleneck"):
        raise EditError(f"metric is {metric!r}; there are 'output' and 'bottleneck'.")
    if not 0 < effect < float("inf"):
        raise EditError(f"effect is {effect}; it is a number above 0.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    base = base_of(pipe)
    kept, times, which = trajectories(
        base, prompts, samples=samples, steps=steps, guidance=guidance, generator=generator
    )
    step = int(at * steps)
    told = encoded(base, prompts).rows(which.to(base.device))
    latents = kept[:, step].to(torch.promote_types(kept.dtype, torch.float32))
    middle = _Middle(base, latents, times[step], told, guidance)
    start = middle.stream[0]
    start = torch.zeros_like(pool(start) if pooled else start)
    if not 1 <= count <= start.numel():
        raise EditError(
            f"count is {count}; the stream at {middle.place.path} has {start.numel()} directions"
            f"{' that are alike at all places' if pooled else ''}."
        )
    search: dict[str, Any] = {
        "tolerance": tolerance,
        "max_iterations": 6,
        "generator": torch.Generator(base.device).manual_seed(_seed(generator)),
    }
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():  # fused kernels know no forward mode
        if metric == "output":
            found = Pullback(middle.clean, ndim=start.ndim).singular_directions(start, count, **search)
            values, vectors = found.values, found.vectors
        else:
            local = Pullback(middle.streams, ndim=middle.latents.ndim - 1)
            images = local.singular_directions(middle.latents, count, **search).images.flatten(0, 1)
            images = torch.stack([pool(image) for image in images]) if pooled else images
            _, values, right = torch.linalg.svd(images.flatten(1).detach(), full_matrices=False)
            values, vectors = values[:count] / samples**0.5, right[:count].reshape(-1, *start.shape)
        spread = float(middle.clean(start[None]).std()) * middle.outputs**0.5
        directions = []
        for index, (vector, value) in enumerate(zip(map(_signed, vectors), values, strict=True)):
            gain = middle.gain(vector) / spread
            length = min(effect / gain, middle.size(pooled=pooled))
            details = {
                "metric": metric,
                "time": float(times[step]),
                "prompts": list(prompts),
                "value": float(value),
                "effect": length * gain,
            }
            directions.append(Direction(f"direction {index}", vector * length, middle.place, details))
    return directions


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def _signed(vector: Tensor) -> Tensor:
    """The vector or its negative: its largest entry is positive, so that a seed gives one sign."""
    largest = vector.flatten()[vector.abs().argmax()]
    return vector.detach() * largest.sign()


class _Middle:
    """The denoiser at one time of some trajectories, as a map from or to its bottleneck."""

    def __init__(
        self, base: Base, latents: Tensor, time: Tensor, conditioning: Conditioning, guidance: float
    ) -> None:
        self.base, self.latents, self.time = base, latents, time
        self.conditioning, self.guidance = conditioning, guidance
        self.place = find_bottleneck(base.denoiser)
        self.stream = stream_of(self._run(latents), base.denoiser, self.place).to(latents.dtype)

    def clean(self, changes: Float[Tensor, "items ..."]) -> Float[Tensor, "items outputs"]:
        """Clean latents of all samples under each change of the stream, over the root of their number."""
        items, samples = len(changes), len(self.latents)
        latents = self.latents.repeat(items, *(1,) * (self.latents.ndim - 1))
        outputs: list[Tensor] = []
        with shifted(self.base.denoiser, self.place, changes.repeat_interleave(samples, 0)):
            self._run(latents, outputs)()
        times = self.time.expand(len(latents))
        clean = self.base.clean(latents, times, outputs[0]).reshape(items, -1)
        self.outputs = clean.shape[1]
        return clean / self.outputs**0.5

    def gain(self, vector: Tensor) -> float:
        """By how much, as a root mean square, a unit step along a vector changes the clean latents.

        Raises:
            EditError: by nothing.
        """
        found: Any = jvp(self.clean, (torch.zeros_like(vector)[None],), (vector[None],))
        size = float(found[1].norm())
        if not size > 0:
            raise EditError(f"a step at {self.place.path} changes nothing of the output: there is no scale.")
        return size

    def size(self, *, pooled: bool) -> float:
        """How long the stream is: in one place, as a root mean square, or in all places of a sample."""
        rows = self.stream
        if pooled:
            rows = rows.flatten(2).mT if rows.ndim == 4 else rows
            return float(rows.square().sum(-1).mean().sqrt())
        return float(rows.flatten(1).square().sum(-1).mean().sqrt())

    def streams(self, latents: Float[Tensor, "items ..."]) -> Float[Tensor, "items ..."]:
        """The stream at the bottleneck for each sample's latents."""
        return stream_of(self._run(latents), self.base.denoiser, self.place)

    def _run(self, latents: Tensor, outputs: list[Tensor] | None = None) -> Callable[[], None]:
        rows = torch.arange(len(self.latents), device=latents.device)
        times = len(latents) // len(self.latents)

        def run() -> None:
            told = self.conditioning.rows(rows.repeat(times))
            output = self.base.predict(latents, self.time.expand(len(latents)), told, guidance=self.guidance)
            if outputs is not None:
                outputs.append(output)

        return run
