"""What training, use and measurement ask of a diffusion pipeline, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.bases.autoencoder import Autoencoder
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bases.schedule import Prediction, Schedule, schedule_of


class Base(ABC):
    """A pipeline seen through its denoiser. Times are the denoiser's own input (0 … 1000 for most).

    Signal and noise: latents at a time are ``signal(t) · clean + noise(t) · noise``; for flow matching
    ``(1 − σ) · clean + σ · noise`` with σ = t / 1000. Latents are always what the denoiser sees (variance one
    for diffusion), also under schedulers that carry them divided by the signal; and always
    (rows, channels, height, width), also for Flux, which packs them into tokens.

    The scheduler is read once, when the base is made.

    Attributes:
        pipe: the pipeline.
        component: the denoiser's name in the pipeline: "unet" or "transformer".
        denoiser: the module itself.
        prediction: what its output means.
        guidance_distilled: whether guidance is an input of the denoiser (Flux), so that one pass is enough.
        noise_schedule: levels and times of the pipeline's scheduler.
        autoencoder: pixels to latents and back.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    prediction: Prediction
    guidance_distilled: bool = False
    noise_schedule: Schedule
    autoencoder: Autoencoder

    def __init__(self, pipe: Any, component: str, autoencoder: Autoencoder) -> None:
        self.pipe = pipe
        self.component = component
        self.denoiser = getattr(pipe, component)
        self.noise_schedule = schedule_of(pipe.scheduler)
        self.prediction = self.noise_schedule.prediction
        self.autoencoder = autoencoder

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """Encode prompts, a row each, without gradients, as the pipeline itself would.

        Args:
            prompts: a list, not a single string.
            height: pixels of the images to come, for families that are told (SDXL); the default size if None.
            width: likewise.

        Raises:
            EditError: no prompts, or a base that takes none.
        """

    def unconditional(
        self, rows: int = 1, *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """What the pipeline takes for the unconditional half when it is given no negative prompt."""
        return self.encode([""], height=height, width=width).repeat(rows)

    @abstractmethod
    def predict(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        conditioning: Conditioning,
        *,
        guidance: float | int | None = None,
    ) -> Float[Tensor, "rows channels height width"]:
        """One forward pass of the denoiser: its raw output, a time for each row. With gradients if asked for.

        `guidance` is the input of a guidance-distilled denoiser, 1 if None; others ignore it. Latents of
        another type than the denoiser's are converted, and the output is of the latents' type.

        Raises:
            EditError: latents, times and conditioning differ in their rows.
        """

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape of one image's latents as `predict` takes them (without the rows).

        Args:
            height: pixels, or None for the pipeline's default.
            width: likewise.

        Raises:
            EditError: a size that the pipeline's cells do not divide.
        """

    def levels(self, times: Float[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Signal and noise factors at times, shaped (rows, 1, 1, 1) to multiply latents.

        Raises:
            EditError: a time outside the denoiser's range, or NaN.
        """
        signal, noise = self.noise_schedule.levels(times)
        return signal[:, None, None, None], noise[:, None, None, None]

    def schedule(self, steps: int, shape: Sequence[int] | None = None) -> Float[Tensor, " steps"]:
        """The times that the pipeline visits in so many steps, the noisiest first, on the denoiser's device.

        Args:
            steps: how many.
            shape: of one image's latents, where the times depend on it (shifted schedules); default if None.
        """
        if steps < 1:
            raise EditError(f"a trajectory of {steps} steps is none: ask for one step at least")
        return self.noise_schedule.times(steps, **self._timing(steps, shape)).to(self.device)

    def step(
        self,
        output: Float[Tensor, "rows channels height width"],
        index: int,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " steps"],
    ) -> Float[Tensor, "rows channels height width"]:
        """One deterministic sampling step from times[index] to the next time, or after the last to the end.

        ``signal′ · clean + noise′ · noise`` with the clean latents and the noise that the output means. That
        is DDIM with η = 0 (Song et al. 2021), also Euler's step in σ; and for flow matching Euler's step
        ``latents + (σ′ − σ) · output``. Computed in single precision at least.
        """
        time = times[index : index + 1].expand(len(latents))
        clean = self.noise_schedule.limit(self._clean(latents, time, output))
        if index + 1 < len(times):
            signal, noise = self.levels(times[index + 1 : index + 2])
        else:
            signal, noise = (clean.new_tensor(level) for level in self.noise_schedule.end)
        return (signal * clean + noise * self._noise(latents, time, output)).to(latents.dtype)

    def decode(
        self, latents: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows colours pixels_high pixels_wide"]:
        """Images from clean latents, pixels from 0 to 1. Differentiable."""
        return self.autoencoder.decode(latents)

    def encode_images(
        self, images: Float[Tensor, "rows colours pixels_high pixels_wide"]
    ) -> Float[Tensor, "rows channels height width"]:
        """Clean latents (the mean) of images with pixels from 0 to 1."""
        return self.autoencoder.encode(images)

    def clean(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        output: Float[Tensor, "rows channels height width"],
    ) -> Float[Tensor, "rows channels height width"]:
        """The clean latents that an output means (Salimans & Ho 2022 for v; noise − clean for flow)."""
        return self._clean(latents, times, output).to(latents.dtype)

    def noise(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        output: Float[Tensor, "rows channels height width"],
    ) -> Float[Tensor, "rows channels height width"]:
        """The noise that an output means."""
        return self._noise(latents, times, output).to(latents.dtype)

    def _clean(self, latents: Tensor, times: Tensor, output: Tensor) -> Tensor:
        """In single precision at least: the levels are, and promote."""
        signal, noise = self.levels(times)
        match self.prediction:
            case "epsilon":
                return (latents - noise * output) / signal
            case "v_prediction":
                return signal * latents - noise * output
            case "sample":
                return output * torch.ones_like(signal)
            case "flow":
                return latents - noise * output

    def _noise(self, latents: Tensor, times: Tensor, output: Tensor) -> Tensor:
        signal, noise = self.levels(times)
        match self.prediction:
            case "epsilon":
                return output * torch.ones_like(signal)
            case "v_prediction":
                return noise * latents + signal * output
            case "sample":
                return (latents - signal * output) / noise
            case "flow":
                return latents + signal * output

    def guided(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance: float | int,
    ) -> Float[Tensor, "rows channels height width"]:
        """Output under guidance: u + g (c − u) (Ho & Salimans 2022), both halves in one pass.

        One half only if g is 1 or `unconditional` is None; a guidance-distilled denoiser is told g and needs
        no other half. `unconditional` has as many rows as `conditioning`, or one for all.
        """
        if self.guidance_distilled:
            return self.predict(latents, times, conditioning, guidance=guidance)
        if unconditional is None or guidance == 1:
            return self.predict(latents, times, conditioning)
        if len(unconditional) == 1:
            unconditional = unconditional.repeat(len(conditioning))
        both = Conditioning.concatenate([unconditional, conditioning])
        without, with_words = self.predict(latents.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return without + guidance * (with_words - without)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        *,
        steps: int,
        guidance: float | int,
        noise: Float[Tensor, "rows channels height width"],
        unconditional: Conditioning | None = None,
        keep: Sequence[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A whole trajectory without gradients: clean latents, and the noisy ones before the steps in `keep`.

        Args:
            conditioning: a row for each image.
            steps: how many denoising steps.
            guidance: see `guided`.
            noise: of variance one; draw it with a generator.
            unconditional: see `guided`; usually ``base.unconditional()``.
            keep: indices of steps; the latents before step k are those at time ``schedule(steps)[k]``.
            stop: end before this step, with noisy latents in the place of the clean ones.

        Returns:
            Clean latents (rows, channels, height, width); kept ones (rows, kept, channels, height, width).

        Raises:
            EditError: a step to keep that is not there, or noise that is not finite.
        """
        last = steps if stop is None else stop
        if not 0 <= last <= steps:
            raise EditError(f"stop is {stop}; a trajectory of {steps} steps ends before one of 0 … {steps}")
        if any(not 0 <= index < last for index in keep):
            raise EditError(f"steps {list(keep)} are not all among 0 … {last - 1}: nothing to keep there")
        if not bool(noise.isfinite().all()):
            raise EditError("the noise to start from has entries that are NaN or infinite")
        times = self.schedule(steps, noise.shape[1:])
        latents = self.noise_schedule.start(noise, steps, **self._timing(steps, noise.shape[1:]))
        before: dict[int, Tensor] = {}
        for index in range(last):
            if index in keep:
                before[index] = latents
            now = times[index : index + 1].expand(len(latents))
            output = self.guided(latents, now, conditioning, unconditional, guidance)
            latents = self.step(output, index, latents, times)
        if not keep:
            return latents, latents.unsqueeze(1)[:, :0]
        return latents, torch.stack([before[index] for index in keep], 1)

    def _timing(self, steps: int, shape: Sequence[int] | None) -> dict[str, Any]:
        """What the family's pipeline tells the scheduler beside the number of steps."""
        return {}

    @property
    def config(self) -> Any:
        """The denoiser's config."""
        return self.denoiser.config

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes: where its weights are, or where offloading moves them."""
        placed = getattr(getattr(self.denoiser, "_hf_hook", None), "execution_device", None)
        return next(self.denoiser.parameters()).device if placed is None else torch.device(placed)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the denoiser computes in."""
        return next(p.dtype for p in self.denoiser.parameters() if p.dtype.is_floating_point)


def check_rows(latents: Tensor, times: Tensor, conditioning: Conditioning) -> None:
    """Raise unless there is a time and a prompt for each row of latents."""
    if not len(latents) == len(times) == len(conditioning):
        raise EditError(
            f"{len(latents)} rows of latents, {len(times)} times and {len(conditioning)} prompts: "
            "there must be as many of each"
        )


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; raise if there are none, or something else than strings."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise EditError(f"prompts are a list of strings, not {prompts!r}: write [prompt] for one")
    if not prompts:
        raise EditError("no prompt to encode: give at least one ('' for the unconditional)")
    return list(prompts)
