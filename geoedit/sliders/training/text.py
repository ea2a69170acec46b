"""Text sliders: the difference between two prompts, taught at both signs, with everything else kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.spec import Prompts, SliderSpec
from geoedit.sliders.training.adapters import row_scales
from geoedit.sliders.training.geometry import DenoiserTangents
from geoedit.sliders.training.regression import loss_weights
from geoedit.sliders.training.task import Batch, Task
from geoedit.sliders.training.trajectories import frozen, integers, normal, uniform, visit

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings

CONTEXTS = 512
"""No more combinations of words than this are encoded; a draw of them is taken if there are more."""


class TextTask(Task):
    r"""The denoiser at scale s is to predict the neutral prompt plus s η times the difference of the ends.

    With a context c (the words that must stay, the same in all prompts) and noised latents z, the target is

    .. math::
        \varepsilon_s = \varepsilon(z, n_c)
        + s\,\eta\,\bigl(\varepsilon(z, p_c) - \varepsilon(z, m_c)\bigr),

    brought to the norm of \(\varepsilon(z, n_c)\) if the settings say so. Every drawn latent is taught at +s
    and −s, and some are taught, under prompts that the slider must leave alone, to stay as they are. Latents
    are kept from trajectories of the base and of the slider itself, with the frozen predictions beside them,
    so that a step is one pass of the student and nothing else.

    Args:
        base: the pipeline.
        spec: the prompts.
        batch_size: rows of a step, two for each latent if bipolar; rows that must stay come on top.

    Raises:
        EditError: the spec is not one of text, or there is no room for a couple in a batch.
    """

    def __init__(self, base: Base, spec: SliderSpec, *, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise EditError(f"batch_size is {batch_size}; give 1 or more")
        if spec.kind != "text":
            raise EditError(f"spec {spec.name!r} is of kind {spec.kind!r}, not 'text'")
        self.base, self.spec, self.batch_size = base, spec, batch_size
        self.name = spec.name
        self.components = {base.component: base.denoiser}

    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Encode the prompts and fill the cache from trajectories of the base."""
        self.settings = settings
        self.contexts = self._choose(generator)
        side = resolved(self.base, self.contexts[0].resolution)
        self._shape = self.base.latent_shape(side, side)
        self.unrelated = list(self.spec.unrelated) or [""]
        said = [text for c in self.contexts for text in (c.target, c.neutral, c.positive, c.negative)]
        self.prompts = list(dict.fromkeys([*said, *self.unrelated]))
        self.conditioning = encode_prompts(self.base, self.prompts, side)
        self._nothing = self.base.unconditional(1, height=side, width=side)
        number = {prompt: place for place, prompt in enumerate(self.prompts)}
        device = self.base.device
        self.prompt_rows = {
            part: torch.tensor([number[getattr(c, part)] for c in self.contexts], device=device)
            for part in ("target", "neutral", "positive", "negative")
        }
        self._stay = torch.tensor([number[prompt] for prompt in self.unrelated], device=device)
        signs = [1.0 if c.action == "enhance" else -1.0 for c in self.contexts]
        self._guidance = torch.tensor(
            [
                sign * (settings.guidance if c.guidance is None else c.guidance)
                for sign, c in zip(signs, self.contexts, strict=True)
            ],
            device=device,
        )
        self.cache = self._visit(settings.cache, 0.0, generator)

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """Latents from the cache at both signs of a drawn scale, then some that must stay."""
        settings = self.settings
        if settings.refresh and step and step % settings.refresh == 0:
            self._refresh(generator)
        signs = (1.0, -1.0) if settings.bipolar else (1.0,)
        count = max(1, self.batch_size // len(signs))
        sizes = 1 - uniform(count, generator) if settings.scale_law == "uniform" else torch.ones(count)
        device = self.base.device
        picked = integers(len(self.cache), count, generator).to(device)
        one = self.cache.rows(picked)
        scales = (settings.scale_max * sizes[:, None] * torch.tensor(signs)).to(device)
        factor = (scales * self._guidance[one["context"]][:, None]).to(one["neutral"].dtype)
        spread = factor.reshape(*factor.shape, *(1,) * len(self._shape))
        neutral = one["neutral"][:, None]
        target = neutral + spread * one["difference"][:, None]
        if settings.rescale:
            target = target * (_norm(neutral) / _norm(target).clamp_min(1e-12))
        each = torch.arange(count, device=device).repeat_interleave(len(signs))
        taught = Batch(
            {
                "latents": one["latents"][each],
                "times": one["times"][each],
                "prompt": self.prompt_rows["target"][one["context"]][each],
                "scales": scales.flatten(),
                "target": target.flatten(0, 1),
                "weight": loss_weights(self.base, one["times"], settings.min_snr)[each],
            }
        )
        stay = round(settings.preserve_rows * count) if settings.preserve > 0 else 0
        if not stay:
            return taught
        return Batch.concatenate([taught, self._kept(stay, generator)])

    def loss(self, batch: Batch) -> Float[Tensor, " rows"]:
        """Weighted mean square of each row's error."""
        with row_scales(self.base.denoiser, batch["scales"]):
            output = self.base.predict(
                batch["latents"],
                batch["times"],
                self.conditioning.rows(batch["prompt"]),
                guidance=self.settings.trajectory_guidance,
            )
        error = squared_error(output, batch["target"])
        return batch["weight"] * error

    def describe(self, batch: Batch, row: int) -> str:
        """Timestep, scale and prompt of a row."""
        time, scale = float(batch["times"][row]), float(batch["scales"][row])
        return f"timestep {time:g}, scale {scale:.3g}, prompt {self.prompts[int(batch['prompt'][row])]!r}"

    def state(self) -> dict[str, Tensor]:
        """The cache."""
        return {f"cache.{name}": tensor for name, tensor in self.cache.tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the cache back.

        Raises:
            EditError: the state is not that of a text task.
        """
        found = {name.removeprefix("cache."): tensor for name, tensor in state.items()}
        if found.keys() != self.cache.tensors.keys():
            raise EditError(f"a text task keeps {sorted(self.cache.tensors)}; this state has {sorted(found)}")
        self.cache = Batch(found).to(self.base.device)

    # Help

    def _choose(self, generator: torch.Generator) -> list[Prompts]:
        contexts = list(dict.fromkeys(self.spec.contexts()))
        if len(contexts) <= CONTEXTS:
            return contexts
        order = torch.randperm(len(contexts), generator=generator, device=generator.device)
        return [contexts[place] for place in order[:CONTEXTS].tolist()]

    def _kept(self, count: int, generator: torch.Generator) -> Batch:
        """Latents at any scale whose prediction under an unrelated prompt is to be the frozen one."""
        settings, device = self.settings, self.base.device
        one = self.cache.rows(integers(len(self.cache), count, generator).to(device))
        scales = settings.scale_max * (2 * uniform(count, generator) - 1)
        weight = loss_weights(self.base, one["times"], settings.min_snr)
        return Batch(
            {
                "latents": one["latents"],
                "times": one["times"],
                "prompt": one["stay"],
                "scales": scales.to(device),
                "target": one["stayed"],
                "weight": settings.preserve * weight,
            }
        )

    def _refresh(self, generator: torch.Generator) -> None:
        """Replace the oldest trajectories."""
        settings = self.settings
        count = max(1, round(settings.refresh_share * settings.cache))
        fresh = self._visit(count, settings.on_policy, generator)
        rest = torch.arange(min(len(fresh), len(self.cache)), len(self.cache), device=self.base.device)
        self.cache = Batch.concatenate([self.cache.rows(rest), fresh])

    def _visit(self, count: int, on_policy: float, generator: torch.Generator) -> Batch:
        """Trajectories, some of them with the slider at work, and the base's predictions along them."""
        settings, base, device = self.settings, self.base, self.base.device
        context = integers(len(self.contexts), count, generator).to(device)
        own = uniform(count, generator) < on_policy
        scales = settings.scale_max * (2 * uniform(count, generator) - 1) * own
        like = next(iter(self.conditioning.tensors.values()))
        latents, times = visit(
            base,
            self.conditioning.rows(self.prompt_rows["target"][context]),
            scales.to(device) if bool(own.any()) else None,
            noise=normal((count, *self._shape), generator, like),
            steps=settings.trajectory_steps,
            guidance=settings.trajectory_guidance,
            unconditional=None if base.guidance_distilled else self._nothing,
            keep=settings.kept,
        )
        kept = latents.shape[1]
        latents, times = latents.flatten(0, 1), times.repeat(count).to(device)
        context = context.repeat_interleave(kept)
        stay = self._stay[integers(len(self.unrelated), len(context), generator).to(device)]
        rows = torch.cat(
            [*(self.prompt_rows[part][context] for part in ("neutral", "positive", "negative")), stay]
        )
        wanted = 4 if settings.preserve > 0 and settings.preserve_rows > 0 else 3
        said = frozen(
            base,
            latents.repeat(wanted, *(1,) * len(self._shape)),
            times.repeat(wanted),
            self.conditioning,
            rows[: wanted * len(context)],
            guidance=settings.trajectory_guidance,
        ).chunk(wanted)
        difference = said[1] - said[2]
        if settings.project:
            told = self.conditioning.rows(rows[: len(context)])
            difference = DenoiserTangents(base)(base.clean(latents, times, said[0]), difference, told)
        found = {
            "latents": latents,
            "times": times,
            "context": context,
            "neutral": said[0],
            "difference": difference,
        }
        if wanted == 4:
            found |= {"stay": stay, "stayed": said[3]}
        return Batch(found)


def squared_error(output: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
    """Mean square of each row's error, in single precision at least."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def encode_prompts(
    base: Base, prompts: list[str], side: int | None = None, together: int = 64
) -> Conditioning:
    """Prompts encoded so many at a time."""
    parts = [prompts[start : start + together] for start in range(0, len(prompts), together)]
    return Conditioning.concatenate([base.encode(part, height=side, width=side) for part in parts])


def resolved(base: Base, resolution: int | None) -> int | None:
    """A spec's resolution in pixels, but no larger than what the pipeline draws; None for its own size."""
    own = min(base.latent_shape()[1:]) * base.autoencoder.cell
    return None if resolution is None or resolution >= own else resolution


def _norm(output: Tensor) -> Tensor:
    """Norm of each row and sign, shaped to divide."""
    return output.float().flatten(2).norm(dim=2).reshape(*output.shape[:2], *(1,) * (output.ndim - 2))
