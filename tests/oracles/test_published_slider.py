"""The published trainer's step as plain formulas on diffusers' parts, against the task that reproduces it."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from geoedit.sliders.bases import base_of
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import Adapters, row_scales
from geoedit.sliders.training.published import PublishedTask
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.targets import target_paths
from geoedit.testbeds.shapes.tokens import LENGTH, build_tokenizer

PROMPTS = {"target": "a shape", "positive": "a large shape", "negative": "a small shape", "neutral": "a bar"}
STEPS, GUIDANCE, ROWS = 50, 4.0, 2
QUICK = [3, 7]  # seeds of 4 and 7 sampling steps


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Stable Diffusion 1 in miniature, of random weights, in double precision."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=LENGTH, initializer_range=0.3,
                    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16,
                down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
                mid_block_type=None, attention_head_dim=2, norm_num_groups=4,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                steps_offset=1,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    return pipe.to(torch.float64)


@pytest.fixture
def adapters(pipe: Any) -> Any:
    """An adapter that changes something, so that the trajectories are those of the slider at work."""
    generator = torch.Generator().manual_seed(1)
    targets = {"unet": target_paths(pipe.unet, "attn")}
    with Adapters({"unet": pipe.unet}, targets, rank=2, generator=generator) as adapters:
        for up, down in adapters.pairs():
            up.data = 0.2 * torch.randn(up.shape, generator=generator, dtype=torch.float64)
            down.data = down.data.double()
        yield adapters


class Published:
    """The step of the published `train_lora.py`, written out."""

    def __init__(self, pipe: Any, adapters: Adapters) -> None:
        self.pipe, self.adapters, self.forwards = pipe, adapters, 0
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def embed(self, prompt: str) -> Tensor:
        ids = self.pipe.tokenizer(
            [prompt], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipe.text_encoder(ids)[0]

    def predict(self, latents: Tensor, time: Tensor, unconditional: str, prompt: str, scale: float) -> Tensor:
        """u + scale (c − u), both halves always computed."""
        words = torch.cat([self.embed(unconditional), self.embed(prompt)]).repeat_interleave(len(latents), 0)
        self.forwards += 2
        without, given = self.pipe.unet(torch.cat([latents] * 2), time, words).sample.chunk(2)
        return without + scale * (given - without)

    @torch.no_grad()
    def step(self, visited: int, latents: Tensor, p: dict[str, str]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timestep, and what the student is to predict there."""
        self.scheduler.set_timesteps(STEPS)
        for time in self.scheduler.timesteps[:visited]:
            noise = self.predict(latents, time, p["negative"], p["target"], 3)
            latents = self.scheduler.step(noise, time, latents).prev_sample
        self.scheduler.set_timesteps(1000)
        time = self.scheduler.timesteps[int(visited * 1000 / STEPS)]
        with row_scales(self.pipe.unet, torch.zeros(1)):  # the network's multiplier outside `with network:`
            positive, neutral, negative = (
                self.predict(latents, time, p["negative"], p[name], 1)
                for name in ("positive", "neutral", "negative")
            )
        return latents, time, neutral + GUIDANCE * (positive - negative)


def task_of(pipe: Any, generator: torch.Generator, **settings: Any) -> PublishedTask:
    task = PublishedTask(base_of(pipe), SliderSpec(**PROMPTS, guidance=GUIDANCE), batch_size=ROWS)
    task.prepare(TrainSettings(trajectory_steps=STEPS, published=True, **settings), generator)
    return task


def draws(seed: int) -> tuple[int, Tensor]:
    """The random numbers of a step, in the order in which the task draws them."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(1, (1,), generator=generator)
    visited = 1 + int(torch.randint(STEPS - 1, (1,), generator=generator))
    return visited, torch.randn(ROWS, 4, 4, 4, generator=generator).double()


@pytest.mark.parametrize("seed", QUICK)
def test_the_same_latents_timesteps_and_targets(pipe: Any, adapters: Adapters, seed: int) -> None:
    visited, noise = draws(seed)
    latents, time, target = Published(pipe, adapters).step(visited, noise, PROMPTS)
    generator = torch.Generator().manual_seed(seed)
    batch = task_of(pipe, generator).draw(0, generator)
    torch.testing.assert_close(batch["latents"], latents, rtol=0, atol=1e-6)
    assert batch["times"].tolist() == [float(time)] * ROWS
    torch.testing.assert_close(batch["target"], target, rtol=0, atol=1e-6)


def test_the_same_loss_and_gradient(pipe: Any, adapters: Adapters) -> None:
    visited, noise = draws(QUICK[1])
    plain = Published(pipe, adapters)
    latents, time, target = plain.step(visited, noise, PROMPTS)
    student = plain.predict(latents, time, PROMPTS["negative"], PROMPTS["target"], 1)
    loss = torch.nn.MSELoss()(student, target)
    wanted = torch.autograd.grad(loss, adapters.parameters())
    generator = torch.Generator().manual_seed(QUICK[1])
    task = task_of(pipe, generator)
    rows = task.loss(task.draw(0, generator))
    assert rows.shape == (ROWS,)
    torch.testing.assert_close(rows.mean(), loss, rtol=1e-6, atol=0)
    found = torch.autograd.grad(rows.mean(), adapters.parameters())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_its_timestep_is_19_off_and_the_flag_mends_it(pipe: Any, adapters: Adapters) -> None:
    for seed in QUICK:
        times = []
        for which in ("off", "own"):
            generator = torch.Generator().manual_seed(seed)
            batch = task_of(pipe, generator, published_timestep=which).draw(0, generator)
            times.append(float(batch["times"][0]))
        visited, _ = draws(seed)
        assert times == [1000 - 20 * visited, 981 - 20 * visited]


def test_erasing_points_the_other_way(pipe: Any, adapters: Adapters) -> None:
    found = []
    for action in ("enhance", "erase"):
        generator = torch.Generator().manual_seed(QUICK[0])
        spec = SliderSpec(**PROMPTS, guidance=GUIDANCE, action=action)
        task = PublishedTask(base_of(pipe), spec, batch_size=1)
        task.prepare(TrainSettings(trajectory_steps=STEPS, published=True), generator)
        found.append(task.draw(0, generator))
    latents, time = found[0]["latents"], found[0]["times"][0]
    with torch.no_grad(), row_scales(pipe.unet, torch.zeros(1)):
        plain = Published(pipe, adapters)
        neutral = plain.predict(latents, time, PROMPTS["negative"], PROMPTS["neutral"], 1)
    torch.testing.assert_close(found[0]["target"] + found[1]["target"], 2 * neutral, rtol=0, atol=1e-6)


def test_a_published_step_takes_58_forwards_on_average(pipe: Any, adapters: Adapters) -> None:
    plain = Published(pipe, adapters)
    plain.step(25, torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double(), PROMPTS)
    assert plain.forwards + 2 == 58  # the student's own pass comes after it
