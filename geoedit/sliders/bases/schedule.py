"""Signal and noise at a time, and the times that a pipeline visits, read from its scheduler."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


class Schedule(ABC):
    """A scheduler's levels and times. It works on a copy: the pipeline's own scheduler is never touched.

    Attributes:
        prediction: what the denoiser's output means.
        config: the scheduler's.
        count: the number of times that it was trained on.
        end: signal and noise factors after the last step.
    """

    prediction: Prediction
    end: tuple[float, float]

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self.config = scheduler.config
        self.count = int(self.config.num_train_timesteps)

    @abstractmethod
    def levels(self, times: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Signal and noise factors at times.

        Raises:
            EditError: a time that the denoiser was never trained on, or NaN.
        """

    def times(self, steps: int, **options: Any) -> Float[Tensor, " steps"]:
        """The times of so many steps, the noisiest first; `options` go to the scheduler's ``set_timesteps``.

        Multistep and higher-order schedulers visit times twice, or times between; here each step has one.
        """
        scheduler = self._set(steps, **options)
        times = torch.as_tensor(scheduler.timesteps).detach().to("cpu", torch.float32).unique().flip(0)
        if len(times) == steps:
            return times
        from diffusers import DDIMScheduler

        plain = DDIMScheduler(
            num_train_timesteps=self.count,
            timestep_spacing=self.config.get("timestep_spacing", "leading"),
            steps_offset=self.config.get("steps_offset", 0),
        )
        plain.set_timesteps(steps)
        return plain.timesteps.to(torch.float32)

    def start(self, noise: Tensor, steps: int, **options: Any) -> Tensor:
        """What the denoiser is given in the first step, from noise of variance one.

        Schedulers that begin below pure noise (Euler's, at σ_max) scale it; most do not.
        """
        scheduler = self._set(steps, **options)
        if not hasattr(scheduler, "scale_model_input"):
            return noise
        latents = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
        return latents.to(noise.dtype)

    def limit(self, clean: Tensor) -> Tensor:
        """Predicted clean latents, clipped where the scheduler clips them."""
        return clean

    def _set(self, steps: int, **options: Any) -> Any:
        if steps < 1:
            raise EditError(f"a trajectory of {steps} steps is none: ask for one step at least")
        scheduler = copy.deepcopy(self._scheduler)
        try:
            scheduler.set_timesteps(steps, **options)
        except (ValueError, IndexError) as error:
            raise EditError(
                f"{type(scheduler).__name__} makes no schedule of {steps} steps: {error}"
            ) from error
        return scheduler

    def _check(self, times: Tensor, last: int) -> None:
        if not bool(((times >= 0) & (times <= last)).all()):  # NaN fails, too
            raise EditError(
                f"times from {times.min():g} to {times.max():g} are not all between 0 and {last}, where this "
                "denoiser was trained"
            )


class Diffusion(Schedule):
    """Variance kept: ``signal² + noise² = 1``, with ``signal² = ᾱ(t)`` from the scheduler's own table.

    Between two whole times the ratio σ = noise / signal is interpolated, as Euler-type schedulers do:
    linearly, or its logarithm if the scheduler places its times by σ (Karras, exponential, beta spacing).
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.prediction = _prediction(self.config.get("prediction_type", "epsilon"))
        alphas = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
        if self.prediction == "epsilon" and float(alphas.min()) <= 0:
            raise EditError(
                "the scheduler ends in pure noise (zero terminal signal), and a denoiser that predicts noise "
                "says nothing there: set prediction_type='v_prediction', or rescale_betas_zero_snr=False"
            )
        self._table = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()])
        spaced = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        self._logarithmic = any(self.config.get(name) for name in spaced)
        last = getattr(scheduler, "final_alpha_cumprod", None)
        if last is None and self.config.get("final_sigmas_type") == "sigma_min":
            last = alphas[0]
        final = 1.0 if last is None else float(last)
        self.end = (final**0.5, (1 - final) ** 0.5)

    def levels(self, times: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Square roots of ᾱ and 1 − ᾱ; see the class for times between."""
        self._check(times, self.count - 1)
        dtype = torch.promote_types(times.dtype, torch.float32)
        self._table = self._table.to(times.device)
        signal, noise = self._table.to(dtype)
        low = times.floor().long()
        high = times.ceil().long()
        part = (times - low).to(dtype)
        ratio = noise / signal
        if self._logarithmic:
            sigma = torch.lerp(ratio[low].log(), ratio[high].log(), part).exp()
        else:
            sigma = torch.lerp(ratio[low], ratio[high], part)
        whole = low == high
        return (
            torch.where(whole, signal[low], (1 + sigma**2).rsqrt()),
            torch.where(whole, noise[low], (1 + sigma**-2).rsqrt()),
        )

    def limit(self, clean: Tensor) -> Tensor:
        """Clipped to ± `clip_sample_range` where the scheduler does so.

        Raises:
            EditError: the scheduler thresholds by quantiles of each image, which is not built here.
        """
        if self.config.get("thresholding"):
            raise EditError(
                "the scheduler thresholds its predictions by quantiles (thresholding=True): set it to False"
            )
        if not self.config.get("clip_sample"):
            return clean
        edge = float(self.config.get("clip_sample_range", 1.0))
        return clean.clamp(-edge, edge)


class Flow(Schedule):
    """Flow matching: signal ``1 − σ`` and noise ``σ`` with ``σ = t / count``; the output is noise − clean."""

    prediction: Prediction = "flow"
    end = (1.0, 0.0)

    def levels(self, times: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """1 − σ and σ."""
        self._check(times, self.count)
        share = times.to(torch.promote_types(times.dtype, torch.float32)) / self.count
        return 1 - share, share


def schedule_of(scheduler: Any) -> Schedule:
    """Which kind of schedule a scheduler keeps, by its tables and config.

    Raises:
        EditError: a scheduler of neither kind (such as EDM's, whose denoiser takes log σ as its time).
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if config.get("invert_sigmas") or config.get("timestep_type") == "continuous":
        raise EditError(f"{name} counts time otherwise (inverted or as log σ): its levels are not known here")
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return Flow(scheduler)
    if hasattr(scheduler, "alphas_cumprod"):
        return Diffusion(scheduler)
    if hasattr(scheduler, "sigmas") and float(torch.as_tensor(scheduler.sigmas).max()) <= 1:
        return Flow(scheduler)
    raise EditError(
        f"{name} has neither a table of alphas_cumprod nor levels of flow matching: give the pipeline a "
        "DDIM, Euler or flow-matching scheduler"
    )


def _prediction(name: str) -> Prediction:
    known: dict[str, Prediction] = {
        "epsilon": "epsilon",
        "v_prediction": "v_prediction",
        "sample": "sample",
    }
    if name not in known:
        raise EditError(f"a scheduler with prediction_type={name!r}: known are {', '.join(known)}")
    return known[name]
