"""The published trainer's loss and step, for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import row_scales
from geoedit.sliders.training.task import Batch, Task
from geoedit.sliders.training.text import encode_prompts, resolved, squared_error
from geoedit.sliders.training.trajectories import frozen, integers, normal

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings

GUIDANCE = 3.0
"""Guidance of the partial trajectories, as the published code has it."""
CELLS = 64
"""Pixels that drawn sides are multiples of, likewise."""


class PublishedTask(Task):
    r"""The slider at scale 1 is to predict the neutral prompt plus η times the difference of the ends.

    In each step one set of prompts is drawn, a number k of sampling steps, and noise; the noise is denoised
    for k of `trajectory_steps` steps with the slider on, under the target prompt, away from the negative one
    with guidance 3. There the loss is the mean square of

    .. math::
        \varepsilon_\theta(z, t, \text{target}) - \varepsilon(z, t, \text{neutral})
        \mp \eta\,\bigl(\varepsilon(z, t, \text{positive}) - \varepsilon(z, t, \text{negative})\bigr).

    There is one sign, no weight and no rescaling. The published code takes for t the entry ⌊1000 k / steps⌋
    of a schedule of 1000 steps. A latent after k of 50 DDIM steps has the timestep 981 − 20 k, and is
    evaluated at 1000 − 20 k: 19 off, always. ``published_timestep="off"`` does so, ``"own"`` takes the
    latent's own.

    Predictions that the published code computes in both halves of guidance 1 are computed once here; the
    numbers are the same.

    Args:
        base: the pipeline.
        spec: the prompts.
        batch_size: latents of a step.

    Source: Gandikota et al., "Concept Sliders: LoRA Adaptors for Precise Control in Diffusion Models" (2023),
    and github.com/rohitgandikota/sliders.

    Raises:
        EditError: the spec is not one of text, or the batch is empty.
    """

    def __init__(self, base: Base, spec: SliderSpec, *, batch_size: int = 1) -> None:
        if batch_size < 1 or spec.kind != "text":
            raise EditError(
                f"PublishedTask: kind {spec.kind!r} and {batch_size} rows; needs text and 1 or more"
            )
        self.base, self.spec, self.batch_size = base, spec, batch_size
        self.name = spec.name
        self.components = {base.component: base.denoiser}

    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Encode the prompts."""
        if settings.trajectory_steps < 2:
            raise EditError("trajectory_steps is 1; the published step stops on the way, which takes 2")
        self.settings = settings
        self.contexts = list(dict.fromkeys(self.spec.contexts()))
        said = [text for c in self.contexts for text in (c.target, c.neutral, c.positive, c.negative)]
        self.prompts = list(dict.fromkeys(said))
        self.conditioning = encode_prompts(self.base, self.prompts)

    @torch.no_grad()
    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """Partly denoised latents of one set of prompts, and what is to be predicted there."""
        base, settings, rows = self.base, self.settings, self.batch_size
        prompts = self.contexts[int(integers(len(self.contexts), 1, generator))]
        visited = 1 + int(integers(settings.trajectory_steps - 1, 1, generator))
        shape = self._shape(prompts.resolution, prompts.dynamic_resolution, generator)
        like = next(iter(self.conditioning.tensors.values()))
        latents = normal((rows, *shape), generator, like)
        target, neutral, positive, negative = (
            torch.full((rows,), self.prompts.index(text), device=base.device)
            for text in (prompts.target, prompts.neutral, prompts.positive, prompts.negative)
        )
        with row_scales(base.denoiser, None):
            latents, _ = base.sample(
                self.conditioning.rows(target),
                steps=settings.trajectory_steps,
                stop=visited,
                guidance=GUIDANCE,
                noise=latents,
                unconditional=self.conditioning.rows(negative),
            )
        if settings.published_timestep == "off":
            time = base.schedule(1000, shape)[int(visited * 1000 / settings.trajectory_steps)]
        else:
            time = base.schedule(settings.trajectory_steps, shape)[visited]
        times = time.expand(rows)
        said = frozen(
            base,
            latents.repeat(3, *(1,) * len(shape)),
            times.repeat(3),
            self.conditioning,
            torch.cat([neutral, positive, negative]),
            guidance=settings.trajectory_guidance,
        ).chunk(3)
        sign = 1.0 if prompts.action == "enhance" else -1.0
        guidance = sign * (settings.guidance if prompts.guidance is None else prompts.guidance)
        return Batch(
            {
                "latents": latents,
                "times": times,
                "prompt": target,
                "target": said[0] + guidance * (said[1] - said[2]),
            }
        )

    def loss(self, batch: Batch) -> Float[Tensor, " rows"]:
        """Mean square of each row's error, at scale 1."""
        with row_scales(self.base.denoiser, None):
            output = self.base.predict(
                batch["latents"],
                batch["times"],
                self.conditioning.rows(batch["prompt"]),
                guidance=self.settings.trajectory_guidance,
            )
        return squared_error(output, batch["target"])

    def describe(self, batch: Batch, row: int) -> str:
        """Timestep and prompt of a row."""
        time, prompt = float(batch["times"][row]), self.prompts[int(batch["prompt"][row])]
        return f"timestep {time:g}, scale 1, prompt {prompt!r}"

    def _shape(self, resolution: int | None, dynamic: bool, generator: torch.Generator) -> tuple[int, ...]:
        """Latents of a square, or of drawn sides from half of it upwards, as the published code has it."""
        side = resolved(self.base, resolution)
        if side is None or not dynamic or side < 2 * CELLS:
            return self.base.latent_shape(side, side)
        low, high = side // 2 // CELLS, side // CELLS
        height, width = (CELLS * (low + int(integers(high - low, 1, generator))) for _ in range(2))
        return self.base.latent_shape(height, width)
