"""Bases against diffusers' own pipelines: what the denoiser is given, and what comes out."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoedit.sliders.bases import Base, Conditioning, base_of

PROMPTS = ["a small red bar", "a large blue ellipse"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Fresh = Callable[..., Any]


def draw(base: Base, rows: int = 2, seed: int = 1, **size: int) -> Tensor:
    return torch.randn(rows, *base.latent_shape(**size), generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, noise: Tensor, *, steps: int, guidance: float, **options: Any) -> Tensor:
    """The pipeline's own images from given noise, each family called in its way."""
    if hasattr(pipe, "_pack_latents"):
        noise = pipe._pack_latents(noise, *noise.shape)
        options = {"height": 16, "width": 16, **options}
    options |= {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    return pipe(PROMPTS, latents=noise.clone(), **options).images


def ours(base: Base, noise: Tensor, *, steps: int, guidance: float, **size: int) -> Tensor:
    clean, _ = base.sample(
        base.encode(PROMPTS, **size), steps=steps, guidance=guidance, noise=noise,
        unconditional=base.unconditional(**size),
    )  # fmt: skip
    return base.decode(clean)


@contextmanager
def heard(denoiser: torch.nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Every tensor that the denoiser is called with, call by call."""
    calls: list[dict[str, Tensor]] = []

    def listen(module: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        flat = {**given, **(given.get("added_cond_kwargs") or {})}
        tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        rows = len(next(iter(tensors.values())))
        tensors["timestep"] = tensors["timestep"].float().expand(rows)
        calls.append(tensors)

    handle = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sample_gives_the_images_of_the_pipeline_and_its_denoiser_hears_the_same(
    tiny_pipe: Any, guidance: float
) -> None:
    base = base_of(tiny_pipe)
    noise = draw(base)
    with heard(base.denoiser) as calls:
        expected = run(tiny_pipe, noise, steps=2, guidance=guidance)
        theirs = list(calls)
        calls.clear()
        images = ours(base, noise, steps=2, guidance=guidance)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert len(theirs) == len(calls) == 2
    for one, other in zip(theirs, calls, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=2e-5, rtol=1e-5, check_dtype=False)
    assert expected.std() > 0.05


def test_sample_on_each_device(fresh_pipe: Fresh, device: torch.device) -> None:
    pipe = fresh_pipe("sd1").to(device)
    base = base_of(pipe)
    noise = draw(base).to(device)
    expected = run(pipe, noise, steps=2, guidance=2.0)
    images = ours(base, noise, steps=2, guidance=2.0)
    assert images.device.type == device.type == base.device.type
    torch.testing.assert_close(images, expected, atol=1e-4 if device.type == "cuda" else 1e-5, rtol=0)


def test_a_base_without_prompts_samples_as_its_pipeline_and_clips(tiny_unconditional: Any) -> None:
    base = base_of(tiny_unconditional)
    seeded = torch.Generator().manual_seed(1)
    pixels = tiny_unconditional(
        batch_size=2, num_inference_steps=3, generator=seeded, output_type="np"
    ).images
    clean, kept = base.sample(base.unconditional(2), steps=3, guidance=1.0, noise=draw(base))
    torch.testing.assert_close(base.decode(clean), torch.from_numpy(pixels).movedim(-1, 1), atol=1e-5, rtol=0)
    assert kept.shape == (2, 0, 3, 8, 8)
    torch.testing.assert_close(base.encode_images(base.decode(clean)), clean.clamp(-1, 1))


EULER = [
    EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing, use_karras_sigmas=karras, steps_offset=offset)
    for spacing, karras, offset in [("linspace", False, 0), ("trailing", False, 0), ("leading", True, 1)]
]
FIRST_ORDER = [
    DPMSolverMultistepScheduler(**BETAS, solver_order=1, final_sigmas_type=end, steps_offset=1)
    for end in ("zero", "sigma_min")
]
PLAIN = [
    DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample", steps_offset=1),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=0.8, steps_offset=1),
]


@pytest.mark.parametrize("scheduler", [*EULER, *FIRST_ORDER, *PLAIN])
def test_other_schedulers_whose_step_is_the_deterministic_one(fresh_pipe: Fresh, scheduler: Any) -> None:
    """Euler's step in σ and the first-order DPM-Solver are DDIM in other coordinates."""
    pipe = fresh_pipe("sd1")
    pipe.scheduler = scheduler
    base = base_of(pipe)
    noise = draw(base)
    expected = run(pipe, noise, steps=4, guidance=2.0)
    torch.testing.assert_close(ours(base, noise, steps=4, guidance=2.0), expected, atol=2e-5, rtol=0)


def test_the_shift_of_times_follows_the_number_of_tokens(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
    base = base_of(pipe)
    noise = draw(base, height=16, width=8)
    expected = run(pipe, noise, steps=3, guidance=2.0, height=16, width=8)
    images = ours(base, noise, steps=3, guidance=2.0, height=16, width=8)
    assert images.shape == (2, 3, 16, 8)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert not torch.equal(base.schedule(3), base.schedule(3, noise.shape[1:]))
    torch.testing.assert_close(base.schedule(3, noise.shape[1:]), pipe.scheduler.timesteps)


def test_sdxl_is_told_the_size_and_its_autoencoder_may_have_means(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    base = base_of(pipe)
    noise = draw(base, height=8, width=24)
    expected = run(pipe, noise, steps=2, guidance=3.0, height=8, width=24)
    images = ours(base, noise, steps=2, guidance=3.0, height=8, width=24)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert base.encode(PROMPTS, height=8, width=24).tensors["time_ids"].tolist() == [[8, 24, 0, 0, 8, 24]] * 2
    latents = base.encode_images(images)
    mean = pipe.vae.encode(images * 2 - 1).latent_dist.mean
    for channel, (shift, spread) in enumerate([(0.3, 1.5), (-0.2, 0.5), (0.1, 2.0), (0.0, 1.0)]):
        torch.testing.assert_close(latents[:, channel], (mean[:, channel] - shift) / spread * 0.13025)


def test_the_refiner_is_told_a_score(fresh_pipe: Fresh) -> None:
    whole = fresh_pipe("sdxl")
    whole.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + 24)
    whole.unet.add_embedding.linear_1 = torch.nn.Linear(64, whole.unet.add_embedding.linear_1.out_features)
    parts = {name: part for name, part in whole.components.items() if name != "feature_extractor"}
    parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    size = (16, 16)
    expected = refiner._get_add_time_ids(
        size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, torch.float32, text_encoder_projection_dim=24
    )
    base = base_of(refiner)
    torch.testing.assert_close(base.encode(["a bar"]).tensors["time_ids"], expected[0])
    torch.testing.assert_close(base.unconditional().tensors["time_ids"], expected[1])
    assert base.encode(["a bar"]).tensors["words"].shape[-1] == 24


def test_a_unet_distilled_from_guidance_hears_the_scale(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sd1")
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = type(pipe.unet)(**{**config, "time_cond_proj_dim": 8}).eval()
    base = base_of(pipe)
    assert base.guidance_distilled
    noise = draw(base)
    images = ours(base, noise, steps=2, guidance=7.0)
    torch.testing.assert_close(images, run(pipe, noise, steps=2, guidance=7.0), atol=1e-5, rtol=0)
    assert not torch.allclose(images, ours(base, noise, steps=2, guidance=2.0), atol=1e-4)


def test_kept_latents_are_those_that_the_pipeline_has_before_these_steps(tiny_pipe: Any) -> None:
    base = base_of(tiny_pipe)
    noise = draw(base)
    seen: list[Tensor] = []

    def listen(pipe: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"])
        return values

    run(tiny_pipe, noise, steps=4, guidance=2.0, callback_on_step_end=listen)
    words, empty = base.encode(PROMPTS), base.unconditional()
    _, kept = base.sample(words, steps=4, guidance=2.0, noise=noise, unconditional=empty, keep=[2, 0])
    before = seen[1]
    if before.ndim == 3:
        before = tiny_pipe._unpack_latents(before, 16, 16, 2)
    if isinstance(tiny_pipe.scheduler, EulerDiscreteScheduler):  # it carries latents divided by the signal
        before = before * base.levels(base.schedule(4)[2:3])[0]
    torch.testing.assert_close(kept[:, 0], before, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(kept[:, 1], noise)
    early, none = base.sample(words, steps=4, guidance=2.0, noise=noise, unconditional=empty, stop=2)
    assert torch.equal(early, kept[:, 0]) and none.shape[1] == 0


def test_both_halves_go_through_in_one_pass_and_one_half_where_that_is_enough(tiny_pipe: Any) -> None:
    base = base_of(tiny_pipe)
    latents, times = draw(base), torch.tensor([901.0, 33.0])
    words, empty = base.encode(PROMPTS), base.unconditional()
    with heard(base.denoiser) as calls, torch.no_grad():
        guided = base.guided(latents, times, words, empty, 3.0)
        alone = base.guided(latents, times, words, empty, 1.0)
        torch.testing.assert_close(base.guided(latents, times, words, None, 1), alone)
    rows = [len(call["timestep"]) for call in calls]
    if base.guidance_distilled:
        assert rows == [2, 2, 2]
        return
    assert rows == [4, 2, 2]
    with torch.no_grad():
        without = base.predict(latents, times, base.unconditional(2))
    torch.testing.assert_close(guided, 3 * alone - 2 * without, atol=1e-5, rtol=1e-5)


def test_rows_are_independent_and_each_has_its_time(tiny_pipe: Any) -> None:
    base = base_of(tiny_pipe)
    latents, times, words = draw(base), torch.tensor([901.0, 33.0]), base.encode(PROMPTS)
    with torch.no_grad():
        both = base.predict(latents, times, words)
        for row in range(2):
            part = slice(row, row + 1)
            one = base.predict(latents[part], times[part], words.rows(torch.tensor([row])))
            torch.testing.assert_close(both[part], one, atol=1e-5, rtol=1e-4)
        swapped = base.predict(latents, times.flip(0), words)
    assert not torch.allclose(both, swapped, atol=1e-4)


SCALES = {
    "StableDiffusion3Pipeline": (1.5, 0.06),
    "FluxPipeline": (0.36, 0.12),
    "StableDiffusionXLPipeline": (0.13025, 0.0),
}


def test_an_image_survives_being_encoded_as_its_pipeline_scales_it(tiny_pipe: Any) -> None:
    base = base_of(tiny_pipe)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    scale, shift = SCALES.get(type(tiny_pipe).__name__, (0.18215, 0.0))
    expected = (tiny_pipe.vae.encode(images * 2 - 1).latent_dist.mean - shift) * scale
    latents = base.encode_images(images)
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-5)
    pixels = tiny_pipe.vae.decode(latents / scale + shift).sample
    torch.testing.assert_close(
        base.decode(latents), tiny_pipe.image_processor.postprocess(pixels, output_type="pt")
    )


def test_half_precision_comes_back_as_given_and_sdxl_decodes_in_single(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sdxl")
    base = base_of(pipe)
    noise = draw(base)
    words = base.encode(PROMPTS)
    exact = base.predict(noise, torch.full((2,), 500.0), words)
    latents = noise * 0.1
    pixels = base.decode(latents)
    pipe.to(torch.bfloat16)
    halves = base.predict(noise.bfloat16(), torch.full((2,), 500.0), words)
    assert halves.dtype == torch.bfloat16
    assert base.predict(noise, torch.full((2,), 500.0), words).dtype == torch.float32
    assert (halves.float() - exact).norm() < 0.05 * exact.norm()
    assert base.encode(PROMPTS).tensors["words"].dtype == torch.bfloat16
    pipe.vae.to(torch.float16)
    weights = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    decoded = base.decode(latents.half())
    assert decoded.dtype == torch.float16
    torch.testing.assert_close(decoded.float(), pixels, atol=0.02, rtol=0)
    after = pipe.vae.state_dict()
    assert all(
        after[name].dtype == torch.float16 and torch.equal(after[name], weights[name]) for name in weights
    )


def test_gradients_pass_through_prediction_and_decoding(tiny_pipe: Any) -> None:
    base = base_of(tiny_pipe)
    words = base.encode(PROMPTS[:1])
    time = torch.tensor([400.0])
    assert not words.tensors["words"].requires_grad

    def image(latents: Tensor) -> Tensor:
        return base.decode(0.2 * base.clean(latents, time, base.predict(latents, time, words)))

    latents, push = draw(base, rows=1), draw(base, rows=1, seed=3)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels know no forward mode
        _, forward = torch.func.jvp(image, (latents,), (push,))
    back = torch.func.vjp(image, latents)[1](torch.ones_like(forward))[0]
    torch.testing.assert_close(forward.sum(), (back * push).sum(), rtol=1e-3, atol=1e-3)
    assert forward.abs().sum() > 1e-3


def test_an_offloaded_denoiser_says_where_it_computes(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sd1")
    cpu_offload_with_hook(pipe.unet, "meta")
    assert base_of(pipe).device == torch.device("meta")
    assert next(pipe.unet.parameters()).device == torch.device("cpu")


def test_conditioning_keeps_rows_together() -> None:
    rows = Conditioning({"words": torch.arange(6.0).view(2, 3, 1), "pooled": torch.arange(2.0).view(2, 1)})
    again = Conditioning.concatenate([rows, rows.rows(torch.tensor([1]))])
    assert len(again) == 3
    assert again.tensors["pooled"].flatten().tolist() == [0.0, 1.0, 1.0]
    assert rows.repeat(2).tensors["pooled"].flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert rows.to(torch.float64).tensors["words"].dtype == torch.float64
