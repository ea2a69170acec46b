"""Levels, times and meanings of predictions against diffusers' schedulers; and what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases import Base, Conditioning, base_of
from geoedit.sliders.bases.schedule import Diffusion, Flow, schedule_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Fresh = Callable[..., Any]


def with_scheduler(fresh: Fresh, scheduler: Any, kind: str = "sd1") -> Base:
    pipe = fresh(kind)
    pipe.scheduler = scheduler
    return base_of(pipe)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (DDIMScheduler(**BETAS), Diffusion),
        (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), Diffusion),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), Diffusion),
        (FlowMatchEulerDiscreteScheduler(), Flow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_add_noise_as_the_scheduler_does(
    scheduler: Any, kind: type, dtype: torch.dtype, device: torch.device
) -> None:
    schedule = schedule_of(scheduler)
    assert type(schedule) is kind
    times = torch.tensor([999.0, 500.0, 1.0], dtype=dtype, device=device)
    clean, noise = torch.randn(2, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
    if kind is Flow:
        expected = scheduler.scale_noise(clean, times.float(), noise)
    else:
        expected = scheduler.add_noise(clean, noise, times.long())
    signal, level = schedule.levels(times)
    assert signal.dtype == dtype and signal.device.type == device.type
    mixed = signal[:, None] * clean + level[:, None] * noise
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-5)


def test_levels_between_whole_times_are_euler_s() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(7)
    signal, noise = schedule.levels(scheduler.timesteps)
    torch.testing.assert_close(noise / signal, scheduler.sigmas[:-1])
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(7))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
        (PNDMScheduler, {"skip_prk_steps": False}),
        (HeunDiscreteScheduler, {}),
        (KDPM2DiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (DPMSolverSinglestepScheduler, {}),
        (UniPCMultistepScheduler, {}),
        (UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        (EulerAncestralDiscreteScheduler, {}),
        (LCMScheduler, {}),
    ],
)
def test_each_step_has_one_time_under_every_scheduler(kind: Any, options: dict[str, Any]) -> None:
    check_times(kind(**BETAS, **options), 5)


@pytest.mark.parametrize("steps", [1, 30])
def test_each_step_has_one_time_however_many(steps: int) -> None:
    check_times(FlowMatchHeunDiscreteScheduler(), steps)
    check_times(DDIMScheduler(**BETAS, timestep_spacing="trailing"), steps)


def check_times(scheduler: Any, steps: int) -> None:
    state = dict(vars(scheduler))
    schedule = schedule_of(scheduler)
    times = schedule.times(steps)
    assert len(times) == steps
    assert bool((times.diff() < 0).all())
    signal, noise = schedule.levels(times)
    assert bool((noise.diff() < 0).all()) and bool((signal.diff() > 0).all())
    assert noise[0] > 0.9
    assert all(vars(scheduler)[name] is state[name] for name in state), "the pipeline's scheduler was touched"


@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd1", "epsilon"), ("sd2_v", "v_prediction"), ("sd1", "sample"), ("sd3", "flow")],
)
def test_clean_and_noise_are_found_again_from_what_was_mixed(
    fresh_pipe: Fresh, family: str, prediction: str
) -> None:
    pipe = fresh_pipe(family)
    if prediction == "sample":
        pipe.scheduler = DDIMScheduler(**BETAS, prediction_type="sample")
    base = base_of(pipe)
    assert base.prediction == prediction
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, *base.latent_shape(), dtype=torch.float64, generator=generator)
    times = torch.tensor([900.0, 417.0, 5.0], dtype=torch.float64)
    if prediction == "flow":
        times = base.pipe.scheduler.timesteps[[100, 600, 990]].double()
        latents = base.pipe.scheduler.scale_noise(clean, times, noise)
        output = noise - clean
    else:
        latents = base.pipe.scheduler.add_noise(clean, noise, times.long())
        velocity = DDPMScheduler.get_velocity(base.pipe.scheduler, clean, noise, times.long())
        output = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction]
    torch.testing.assert_close(base.clean(latents, times, output), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(base.noise(latents, times, output), noise, atol=1e-4, rtol=1e-4)
    assert base.clean(latents.half(), times.float(), output.half()).dtype == torch.float16


def test_zero_signal_is_read_by_v_and_refused_for_noise(tiny_sd2_v: Any, fresh_pipe: Fresh) -> None:
    base = base_of(tiny_sd2_v)
    time = base.schedule(4)[:1]
    assert time.item() == 999
    signal, noise = base.levels(time)
    assert (signal.item(), noise.item()) == (0, 1)
    output = torch.ones(1, *base.latent_shape())
    torch.testing.assert_close(base.clean(output, time, output), -output)
    with pytest.raises(EditError, match="v_prediction"):
        with_scheduler(fresh_pipe, DDIMScheduler(rescale_betas_zero_snr=True))


@pytest.mark.parametrize("times", [[1000.0], [-1.0], [float("nan")]])
def test_times_outside_are_refused(tiny_sd1: Any, times: list[float]) -> None:
    with pytest.raises(EditError, match="between 0 and 999"):
        base_of(tiny_sd1).levels(torch.tensor(times))


def test_schedulers_of_other_kinds_are_refused(fresh_pipe: Fresh) -> None:
    for scheduler in (
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ):
        with pytest.raises(EditError, match=type(scheduler).__name__):
            with_scheduler(fresh_pipe, scheduler)
    with pytest.raises(EditError, match="SimpleNamespace has neither"):
        schedule_of(SimpleNamespace(config={"num_train_timesteps": 1000}))
    with pytest.raises(EditError, match="prediction_type='score'"):
        schedule_of(DDPMScheduler(prediction_type="score"))
    base = with_scheduler(fresh_pipe, DDIMScheduler(thresholding=True))
    zeros = torch.zeros(1, *base.latent_shape())
    with pytest.raises(EditError, match="thresholding=True"):
        base.step(zeros, 0, zeros, base.schedule(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "9 channels where latents have 4"),
        ({"out_channels": 8}, "learned variance"),
        ({"num_class_embeds": 10}, "class"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter"),
    ],
)
def test_unets_that_want_more_are_refused_by_name(
    fresh_pipe: Fresh, change: dict[str, Any], message: str
) -> None:
    pipe = fresh_pipe("sd1")
    pipe.unet.register_to_config(**change)
    with pytest.raises(EditError, match=message):
        base_of(pipe)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_that_take_masks_are_refused(fresh_pipe: Fresh, family: str) -> None:
    pipe = fresh_pipe(family)
    pipe.transformer.register_to_config(in_channels=33)
    with pytest.raises(EditError, match="takes 33 channels"):
        base_of(pipe)


def test_what_is_no_pipeline_is_refused(tiny_sd1: Any) -> None:
    with pytest.raises(EditError, match="no scheduler"):
        base_of(tiny_sd1.unet)
    scheduler = tiny_sd1.scheduler
    with pytest.raises(EditError, match="neither a unet nor a transformer"):
        base_of(SimpleNamespace(scheduler=scheduler))
    classes = SimpleNamespace(config={"num_embeds_ada_norm": 1000})
    with pytest.raises(EditError, match="joint_attention_dim"):
        base_of(SimpleNamespace(scheduler=scheduler, transformer=classes))
    base = base_of(tiny_sd1)
    assert base_of(base) is base


def test_prompts_are_refused_where_nothing_attends_to_them(
    tiny_unconditional: Any, fresh_pipe: Fresh
) -> None:
    with pytest.raises(EditError, match="no cross-attention"):
        base_of(tiny_unconditional).encode(["a bar"])
    pipe = fresh_pipe("sd1")
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe.unet = type(pipe.unet)(**{**config, "mid_block_type": None})
    base = base_of(pipe)
    with pytest.raises(EditError, match="no cross-attention"):
        base.encode(["a bar"])
    latents = torch.zeros(1, *base.latent_shape())
    assert base.predict(latents, torch.tensor([5.0]), base.unconditional()).shape == latents.shape


def test_bad_input_is_named(tiny_sd1: Any, tiny_sdxl: Any, tiny_flux: Any) -> None:
    base = base_of(tiny_sd1)
    words = base.encode(["a bar"])
    zeros: Tensor = torch.zeros(2, *base.latent_shape())
    for prompts in ([], "a bar"):
        with pytest.raises(EditError, match="prompt"):
            base.encode(prompts)
    with pytest.raises(EditError, match="2 rows of latents, 2 times and 1 prompts"):
        base.predict(zeros, torch.tensor([5.0, 5.0]), words)
    for steps, keep, noise, message in [
        (0, (), zeros[:1], "0 steps"),
        (2, (2,), zeros[:1], "among 0 … 1"),
        (2, (), zeros[:1] * torch.nan, "NaN"),
        (1001, (), zeros[:1], "1001 steps"),
    ]:
        with pytest.raises(EditError, match=message):
            base.sample(words, steps=steps, guidance=1.0, noise=noise, keep=keep)
    with pytest.raises(EditError, match="stop is 3"):
        base.sample(words, steps=2, guidance=1.0, noise=zeros[:1], stop=3)
    with pytest.raises(EditError, match="height of 15 pixels: it must be a multiple of 2"):
        base.latent_shape(15, 16)
    with pytest.raises(EditError, match="width of 18 pixels: it must be a multiple of 4"):
        base_of(tiny_flux).latent_shape(16, 18)
    flux = base_of(tiny_flux)
    with pytest.raises(EditError, match="both must be even"):
        flux.predict(torch.zeros(1, 4, 3, 4), torch.tensor([5.0]), flux.encode(["a bar"]))
    for images in (torch.full((1, 3, 16, 16), 2.0), torch.full((1, 3, 16, 16), torch.nan)):
        with pytest.raises(EditError, match="outside 0 … 1"):
            base.encode_images(images)
    with pytest.raises(EditError, match="cannot join"):
        Conditioning.concatenate([words, base_of(tiny_sdxl).encode(["a bar"])])
    with pytest.raises(EditError, match="cannot join"):
        Conditioning.concatenate([])


def test_sdxl_parts_that_do_not_belong_together(fresh_pipe: Fresh) -> None:
    pipe = fresh_pipe("sdxl")
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=75)
    with pytest.raises(EditError, match="do not belong together"):
        base_of(pipe).encode(["a bar"])
