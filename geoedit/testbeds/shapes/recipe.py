"""How the shapes pipelines are trained: an autoencoder first, then a denoiser and its words."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from geoedit.testbeds.shapes.digits import digit_caption, digits
from geoedit.testbeds.shapes.pipelines import Family, new_autoencoder, new_pipeline, trained_parts
from geoedit.testbeds.shapes.render import render
from geoedit.testbeds.shapes.world import caption, sample, shares

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a shapes pipeline becomes."""

    family: Family = "unet"
    autoencoder_steps: int = 2500
    autoencoder_batch: int = 32
    autoencoder_learning_rate: float = 2e-3
    divergence: float = 1e-6  # weight of the Kullback–Leibler term, as in latent diffusion
    steps: int = 5000
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.998  # decay of the running mean of the weights, which is what is kept
    images: int = 60_000  # different shapes that the denoiser sees
    digits: float = 0.1  # share of digits among the images
    said: float = 0.5  # share of a shape's attributes that its caption names
    silent: float = 0.1  # share of empty captions, for guidance
    seed: int = 0


def draw(count: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the world: images in [−1, 1], shares of the ranges, class numbers."""
    parameters, kinds = sample(count, generator=generator)
    return render(parameters, kinds) * 2 - 1, shares(parameters), kinds


def train_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """Train the autoencoder on shapes and digits by squared error, and scale its latents to one."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with _own_randomness(recipe.seed):
        autoencoder = new_autoencoder()
    pictures = digits()[0] * 2 - 1
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=recipe.autoencoder_learning_rate, weight_decay=0.0
    )
    average = copy.deepcopy(autoencoder).requires_grad_(False)
    with tqdm(total=recipe.autoencoder_steps, desc="autoencoder", mininterval=5) as bar:
        for step in range(recipe.autoencoder_steps):
            images, _, _ = draw(recipe.autoencoder_batch, recipe, generator)
            few = max(1, round(recipe.digits * len(images)))
            images[:few] = pictures[torch.randint(len(pictures), (few,), generator=generator)]
            posterior = autoencoder.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            error = (autoencoder.decode(latents).sample - images).square().mean()
            loss = error + recipe.divergence * posterior.kl().mean()
            _update(optimizer, loss, step, recipe.autoencoder_steps, recipe.autoencoder_learning_rate, recipe)
            _follow(average, autoencoder, recipe.average, step)
            bar.update()
            bar.set_postfix(error=f"{float(error.detach()):.5f}", refresh=False)
    average.eval()
    latents = encode(average, draw(512, recipe, generator)[0])
    average.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=0.0)
    return average


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Float[Tensor, "count 3 h w"]) -> Tensor:
    """Mean latents of images, in small batches, unscaled."""
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(64)])


@dataclass(frozen=True)
class Latents:
    """Scaled latents of the images that the denoiser sees, and what each image is."""

    latents: Tensor
    shares: list[list[float]]
    kinds: list[int]
    digit: Tensor
    digit_names: list[int]


def make_latents(autoencoder: AutoencoderKL, recipe: Recipe) -> Latents:
    """Draw and encode what the denoiser will see."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    scale = autoencoder.config.scaling_factor
    parts, all_shares, all_kinds = [], [], []
    for start in tqdm(range(0, recipe.images, 1000), desc="latents", mininterval=5):
        images, its_shares, kinds = draw(min(1000, recipe.images - start), recipe, generator)
        parts.append(encode(autoencoder, images) * scale)
        all_shares += its_shares.tolist()
        all_kinds += kinds.tolist()
    pictures, names = digits()
    return Latents(
        torch.cat(parts), all_shares, all_kinds, encode(autoencoder, pictures * 2 - 1) * scale, names.tolist()
    )


def batches(
    latents: Latents, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, list[str]]]:
    """Latents and captions without end; some captions are empty, so that guidance can be asked for."""
    few = round(recipe.digits * recipe.batch)
    while True:
        which = torch.randint(len(latents.latents), (recipe.batch - few,), generator=generator)
        captions = [
            caption(latents.shares[i], latents.kinds[i], said=_said(recipe, generator), generator=generator)
            for i in which.tolist()
        ]
        other = torch.randint(len(latents.digit), (few,), generator=generator)
        captions += [digit_caption(latents.digit_names[i]) for i in other.tolist()]
        silent = (torch.rand(recipe.batch, generator=generator) < recipe.silent).tolist()
        captions = ["" if quiet else text for text, quiet in zip(captions, silent, strict=True)]
        yield torch.cat([latents.latents[which], latents.digit[other]]), captions


def train_denoiser(
    autoencoder: AutoencoderKL,
    recipe: Recipe,
    *,
    every: int = 0,
    look: Callable[[int, Any], None] | None = None,
) -> Any:
    """Train a denoiser and its text encoders on the autoencoder's latents; returns the whole pipeline.

    Args:
        autoencoder: as ``train_autoencoder`` returns it.
        recipe: the settings.
        every: call ``look`` with the step and the averaged pipeline each so many steps.
        look: what to call.
    """
    with _own_randomness(recipe.seed):
        pipe = new_pipeline(recipe.family, autoencoder)
    average = new_pipeline(recipe.family, autoencoder)
    ours, kept = trained_parts(pipe), trained_parts(average)
    for part, copied in zip(ours, kept, strict=True):
        copied.load_state_dict(part.state_dict())
        copied.requires_grad_(False).eval()
        part.train()
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    feed = batches(make_latents(autoencoder, recipe), recipe, generator)
    parameters = [p for part in ours for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
    )
    running = float("nan")
    with tqdm(total=recipe.steps, desc=f"shapes-{recipe.family}", mininterval=5) as bar:
        for step in range(recipe.steps):
            clean, captions = next(feed)
            loss = (_noise_loss if recipe.family == "unet" else _velocity_loss)(
                pipe, clean, captions, generator
            )
            _update(optimizer, loss, step, recipe.steps, recipe.learning_rate, recipe)
            for part, copied in zip(ours, kept, strict=True):
                _follow(copied, part, recipe.average, step)
            latest = float(loss.detach())
            running = latest if math.isnan(running) else 0.98 * running + 0.02 * latest
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
            if every and look is not None and (step + 1) % every == 0:
                look(step + 1, average)
    return average


def _noise_loss(pipe: Any, clean: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
    """Squared error of the predicted noise, weighted by min(SNR, 5) / SNR (Hang et al. 2023)."""
    scheduler = pipe.scheduler
    times = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = scheduler.add_noise(clean, noise, times)
    words = pipe.text_encoder(_ids(pipe, captions))[0]
    predicted = pipe.unet(noisy, times, words).sample
    kept = scheduler.alphas_cumprod[times]
    weight = (5 * (1 - kept) / kept).clamp_max(1)
    return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()


def _velocity_loss(pipe: Any, clean: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
    """Squared error of the predicted velocity ε − x, at times of a logistic normal law (Esser et al. 2024).

    The pipeline pads the words with zeros where a third text encoder would speak, by default 256 of them: a
    few steps show that many, so that their number does not matter.
    """
    share = torch.sigmoid(torch.randn(len(clean), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    level = share[:, None, None, None]
    noisy = (1 - level) * clean + level * noise
    ids = _ids(pipe, captions)
    parts, pooled = [], []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        out = encoder(ids, output_hidden_states=True)
        parts.append(out.hidden_states[-2])
        pooled.append(out[0])
    words = torch.cat(parts, -1)
    draws = torch.rand(2, generator=generator).tolist()
    padding = 256 if draws[0] < 0.1 else round(8 ** (2 * draws[1])) - 1
    words = torch.cat([words, words.new_zeros(len(words), padding, words.shape[-1])], 1)
    predicted = pipe.transformer(noisy, words, torch.cat(pooled, -1), share * 1000).sample
    return (predicted - (noise - clean)).square().mean()


def _ids(pipe: Any, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(tokens.input_ids)


def _said(recipe: Recipe, generator: torch.Generator) -> float:
    """How much a caption says: a share drawn uniformly from none to twice the recipe's."""
    return 2 * recipe.said * float(torch.rand((), generator=generator))


def _update(
    optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int, peak: float, recipe: Recipe
) -> None:
    """One step at the rate of a linear warm-up and a cosine down to a hundredth of the peak."""
    done = max(0.0, (step - recipe.warmup) / max(1, steps - recipe.warmup))
    rate = peak * min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


@torch.no_grad()
def _follow(average: torch.nn.Module, latest: torch.nn.Module, decay: float, step: int) -> None:
    """Move a running mean of the weights towards the latest ones; early on it forgets faster."""
    decay = min(decay, (step + 1) / (step + 10))
    ours: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(ours, [p.detach() for p in latest.parameters()], 1 - decay)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Weights drawn from a seed of their own, with torch's global generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
