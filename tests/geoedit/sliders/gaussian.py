"""A base whose answers are known in closed form: its pictures are samples of a normal distribution."""

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from geoedit.sliders.bases import Base, Conditioning
from geoedit.sliders.bases.schedule import schedule_of

SHAPE = (3, 2, 2)


class Wiener(nn.Module):
    """Sees latents through a linear layer, so that there is something for an adapter to change."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Linear(12, 12, bias=False)
        nn.init.eye_(self.mid_block.weight)

    def forward(self, latents: Tensor) -> Tensor:
        return self.mid_block(latents.flatten(1)).reshape(latents.shape)


class GaussianBase(Base):
    """Pictures are N(mean, covariance), their latents the pixels themselves; prompts say nothing."""

    def __init__(self, prediction: str, mean: Tensor, covariance: Tensor) -> None:
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if prediction != "flow":
            scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
        self.noise_schedule = schedule_of(scheduler)
        self.prediction = self.noise_schedule.prediction
        self.pipe, self.component, self.denoiser = None, "unet", Wiener().to(mean)
        self.mean, self.covariance = mean, covariance

    def encode(self, prompts: Any, *, height: int | None = None, width: int | None = None) -> Conditioning:
        return Conditioning({"words": torch.zeros(len(prompts), 1)})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        return SHAPE

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, *, guidance: float | None = None
    ) -> Tensor:
        seen = self.denoiser(latents.to(self.dtype))
        return self.output(seen, times, self.posterior(seen, times, self.mean)).to(latents.dtype)

    def posterior(self, latents: Tensor, times: Tensor, mean: Tensor) -> Tensor:
        """E[x | z] for N(mean, covariance): mean + α Σ (α² Σ + σ²)⁻¹ (z − α mean)."""
        signal, noise = (level.flatten(1)[:, :, None] for level in self.levels(times))
        eye = torch.eye(12).to(self.covariance)
        spread = signal**2 * self.covariance + noise**2 * eye
        away = latents.flatten(1)[..., None] - signal * mean[..., None]
        found = mean[..., None] + signal * self.covariance @ torch.linalg.solve(spread, away)
        return found.reshape(latents.shape)

    def output(self, latents: Tensor, times: Tensor, clean: Tensor) -> Tensor:
        """What a denoiser of this prediction says if it means these clean latents."""
        signal, noise = self.levels(times)
        epsilon = (latents - signal * clean) / noise
        return {
            "epsilon": epsilon,
            "v_prediction": signal * epsilon - noise * clean,
            "sample": clean * torch.ones_like(noise),
            "flow": epsilon - clean,
        }[self.prediction]


def gaussian_base(prediction: str, seed: int = 0, rank: int = 12) -> GaussianBase:
    """A base of double precision, its covariance of some rank."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    mean = torch.randn(12, generator=generator, dtype=torch.float64)
    return GaussianBase(prediction, mean, root @ root.mT)
