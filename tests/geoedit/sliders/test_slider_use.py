"""Sliders at work against dense arithmetic, diffusers' own schedule of an adapter, and autograd."""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from geoedit.errors import EditError
from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.apply import together
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.fit import describe_base
from manifolds import LowRank
from tests.geoedit.sliders.slider_cases import (
    added,
    apart,
    change_of,
    denoiser_of,
    dense,
    draw,
    random_slider,
    replaced,
)


def test_a_slider_draws_what_the_changed_weights_draw(tiny_pipe: Any) -> None:
    name = denoiser_of(tiny_pipe)
    slider = random_slider(tiny_pipe, name, ranks=(1, 2, 3))
    before = draw(tiny_pipe)
    with slider.at(tiny_pipe, -1.5):
        ours = draw(tiny_pipe)
    with replaced(tiny_pipe, name, added(getattr(tiny_pipe, name), dense(slider, name, -1.5))):
        truth = draw(tiny_pipe)
    assert apart(ours, truth) < 1e-5
    assert apart(before, truth) > 0.01
    assert torch.equal(draw(tiny_pipe), before)


def test_each_sample_has_its_own_scale(tiny_pipe: Any) -> None:
    slider = random_slider(tiny_pipe, denoiser_of(tiny_pipe))
    plain = draw(tiny_pipe)
    with slider.at(tiny_pipe, [1.2, 0.0]):
        mixed = draw(tiny_pipe)
    with slider.at(tiny_pipe, 1.2):
        all_moved = draw(tiny_pipe)
    assert apart(mixed[0], all_moved[0]) < 1e-5
    assert apart(mixed[1], plain[1]) < 1e-6
    assert apart(plain[0], all_moved[0]) > 0.01
    unguided = draw(tiny_pipe, guidance_scale=0.0)
    with slider.at(tiny_pipe, torch.tensor([1.2, 0.0])):
        assert apart(draw(tiny_pipe, guidance_scale=0.0)[1], unguided[1]) < 1e-6


def test_text_encoders_are_moved_too(tiny_sdxl: Any) -> None:
    slider = random_slider(tiny_sdxl, "unet", "text_encoder", "text_encoder_2", ranks=(2, 1))
    with slider.at(tiny_sdxl, [0.7, 0.7]):
        ours = draw(tiny_sdxl)
    parts = {name: added(getattr(tiny_sdxl, name), dense(slider, name, 0.7)) for name in slider.changes}
    with ExitStack() as changed:
        for name, part in parts.items():
            changed.enter_context(replaced(tiny_sdxl, name, part))
        truth = draw(tiny_sdxl)
    assert apart(ours, truth) < 1e-5
    for options in ({"start": 0.5}, {"region": torch.ones(4, 4)}):
        with pytest.raises(EditError, match=r"text_encoder has no time.*only"):
            slider.at(tiny_sdxl, 1.0, **options)


def test_a_late_start_is_diffusers_own_adapter_switched_on_late(
    fresh_pipe: Callable[..., Any], tmp_path: Any
) -> None:
    pipe = fresh_pipe("sd1")
    slider = random_slider(pipe, "unet")
    with slider.at(pipe, 1.5, start=0.5):  # times 751, 501, 251, 1: the last two are beyond half of the way
        late = draw(pipe, num_inference_steps=4)
    with slider.at(pipe, 1.5, stop=0.5):
        early = draw(pipe, num_inference_steps=4)
    with slider.at(pipe, lambda progress: 1.5 if progress >= 0.5 else 0.0):
        called = draw(pipe, num_inference_steps=4)
    slider.save(tmp_path / "moved.safetensors")
    pipe.load_lora_weights(tmp_path / "moved.safetensors", adapter_name="moved")

    def scheduled(first: float, second: float) -> torch.Tensor:
        def after(pipe: Any, step: int, time: Any, found: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe.set_adapters(["moved"], [second])
            return found

        pipe.set_adapters(["moved"], [first])
        return draw(pipe, num_inference_steps=4, callback_on_step_end=after)

    assert apart(late, scheduled(0.0, 1.5)) < 1e-5
    assert apart(called, scheduled(0.0, 1.5)) < 1e-5
    assert apart(early, scheduled(1.5, 0.0)) < 1e-5


def test_progress_is_told_row_by_row(tiny_flux: Any, tiny_sd3: Any) -> None:
    """Flux is told times from 0 to 1, Stable Diffusion 3 from 0 to 1000: progress is the same."""
    seen: dict[str, list[float]] = {}
    for pipe in (tiny_flux, tiny_sd3):
        told = seen.setdefault(type(pipe).__name__, [])
        slider = random_slider(pipe, "transformer")
        with slider.at(pipe, lambda progress, told=told: told.append(progress) or 1.0):
            draw(pipe)
        times = 1 - pipe.scheduler.timesteps / 1000
        assert torch.allclose(torch.tensor(told), times, atol=1e-4)
    rows = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    pooled = torch.randn(2, 24, generator=torch.Generator().manual_seed(2))
    slider, net = random_slider(tiny_sd3, "transformer"), tiny_sd3.transformer
    moved = added(net, dense(slider, "transformer", 1.0))
    given = {"encoder_hidden_states": words, "pooled_projections": pooled, "return_dict": False}
    times = torch.tensor([900.0, 100.0])
    with slider.at(net, 1.0, start=0.5):
        ours = net(rows, timestep=times, **given)[0]
    assert apart(ours[0], net(rows, timestep=times, **given)[0][0]) < 1e-5
    assert apart(ours[1], moved(rows, timestep=times, **given)[0][1]) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_region_blends_what_the_denoiser_gives(family: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(f"tiny_{family}")
    name = denoiser_of(pipe)
    slider = random_slider(pipe, name)
    plain = draw(pipe)
    with slider.at(pipe, 1.0):
        moved = draw(pipe)
    with slider.at(pipe, 1.0, region=torch.ones(16, 16)):
        assert apart(draw(pipe), moved) < 1e-5
    with slider.at(pipe, 1.0, region=torch.zeros(2, 16, 16)):
        assert torch.equal(draw(pipe), plain)
    mask = torch.zeros(2, 8, 8)
    mask[0, :, 4:] = 1.0  # the right half of the first image; nothing of the second
    other = added(getattr(pipe, name), dense(slider, name, 1.0))
    grid = mask if family == "sd1" else torch.nn.functional.avg_pool2d(mask, 2).flatten(1)

    def blended(net: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        rows = output[0].shape[0] // 2
        weight = grid.repeat(rows, *(1,) * (grid.ndim - 1)).unsqueeze(1 if family == "sd1" else -1)
        return (weight * other(*args, **kwargs)[0] + (1 - weight) * output[0],)

    hook = getattr(pipe, name).register_forward_hook(blended, with_kwargs=True)
    truth = draw(pipe)
    hook.remove()
    with slider.at(pipe, 1.0, region=mask):
        ours = draw(pipe)
    assert apart(ours, truth) < 1e-5
    assert torch.equal(ours[1], plain[1])
    assert apart(ours[0], plain[0]) > 0.01


def test_several_sliders_add_up(tiny_sd1: Any) -> None:
    first = random_slider(tiny_sd1, "unet", ranks=(2, 1))
    second = random_slider(tiny_sd1, "unet", among=lambda path: "attn" in path, seed=5)
    sums = dense(first, "unet", 1.5)
    for path, difference in dense(second, "unet", -0.7).items():
        sums[path] = sums[path] + difference
    with replaced(tiny_sd1, "unet", added(tiny_sd1.unet, sums)):
        truth = draw(tiny_sd1)
    with together(tiny_sd1, [first @ 1.5, second @ -0.7]):
        assert apart(draw(tiny_sd1), truth) < 1e-5
    with first.at(tiny_sd1, 1.5), second.at(tiny_sd1, -0.7):
        assert apart(draw(tiny_sd1), truth) < 1e-5
    with together(tiny_sd1, [(first, [1.5, 1.5]), (second, torch.tensor(-0.7))]):
        assert apart(draw(tiny_sd1), truth) < 1e-5


def test_two_regions_at_once(tiny_sd1: Any) -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1.0
    slider = random_slider(tiny_sd1, "unet")
    x, words = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, 16)
    up, down = (added(tiny_sd1.unet, dense(slider, "unet", scale))(x, 400, words)[0] for scale in (1.0, -1.0))
    with slider.at(tiny_sd1, 1.0, region=left), slider.at(tiny_sd1, -1.0, region=1 - left):
        ours = tiny_sd1.unet(x, 400, words).sample
    assert apart(ours, left * up + (1 - left) * down) < 1e-5


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (3, 6, 5, 5)),
    "reflected": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect", dilation=2), (3, 6, 7, 7)),
    "strided": (lambda: nn.Conv2d(6, 8, (1, 3), stride=2), (3, 6, 7, 7)),
    "one row": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (3, 6, 7)),
    "volume": (lambda: nn.Conv3d(3, 4, 2), (3, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    net = nn.Sequential(build())
    change = change_of(net[0], 2, torch.Generator().manual_seed(1), 0.5)
    slider = Slider("moved", {"model": {"0": change}})
    x = torch.randn(shape, dtype=torch.float64)
    truth = added(net, dense(slider, "model", 0.8)).double()(x)
    net = net.to(device, dtype)
    with slider.at(net, 0.8):
        ours = net(x.to(device, dtype))
    with slider.at(net, [0.0, 0.8, -1.0]):
        rows = net(x.to(device, dtype))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert ours.dtype == dtype
    assert apart(ours.double().cpu(), truth) < tolerance
    assert apart(rows[1].double().cpu(), truth[1]) < tolerance
    assert apart(rows[0], net(x.to(device, dtype))[0]) == 0.0


def test_a_language_model(tiny_model: Any) -> None:
    slider = random_slider(tiny_model, "model", among=lambda path: "lm_head" not in path, size=0.2)
    ids = torch.arange(3, 11).reshape(2, 4)
    before = tiny_model(ids).logits
    with slider.at(tiny_model, torch.tensor([1.5, -1.0])):
        ours = tiny_model(input_ids=ids).logits
    for row, scale in enumerate((1.5, -1.0)):
        with slider.update("model", tiny_model).apply(tiny_model, scale):
            assert apart(ours[row], tiny_model(ids).logits[row]) < 1e-5
    assert torch.equal(tiny_model(ids).logits, before)


def test_the_scale_has_derivatives(device: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double().to(device)
    slider = random_slider(net, "model").to(torch.float64)
    curve = Calibration("size", (-1.0, 0.0, 1.0, 2.0), (-0.5, 0.0, 1.0, 3.0))
    bent = dataclasses.replace(slider, calibration=curve)
    x = torch.randn(2, 4, dtype=torch.float64).to(device)

    def out(scale: torch.Tensor) -> torch.Tensor:
        with slider.at(net, scale):
            return net(x)

    def truth(scale: torch.Tensor) -> torch.Tensor:
        weights = {f"{path}.weight": net.get_submodule(path).weight + scale * change.matrix.dense().to(device)
                   for path, change in slider.changes["model"].items()}  # fmt: skip
        return torch.func.functional_call(net, weights, (x,))

    at = torch.tensor(0.3, dtype=torch.float64, device=device)
    ones = torch.ones_like(at)

    def slope(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda scale: torch.func.jvp(function, (scale,), (ones,))[1]

    for derivative in (slope, lambda function: slope(slope(function)), torch.func.jacrev):
        assert torch.allclose(derivative(out)(at), derivative(truth)(at), atol=1e-12)
    with bent.at(net, torch.tensor(1.5)):
        calibrated = net(x)
    assert torch.allclose(calibrated, truth(torch.tensor(2.0, dtype=torch.float64)), atol=1e-12)


def test_autocast_and_half_precision_keep_the_dtype(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(4, 4)).to(device)
    slider = random_slider(net, "model")
    with slider.at(net, 1.0), torch.autocast(device.type, torch.bfloat16):
        assert net(torch.ones(2, 4, device=device)).dtype == torch.bfloat16


def test_another_base_is_refused_with_the_names(tiny_sd1: Any, tiny_sdxl: Any, tiny_sd3: Any) -> None:
    slider = random_slider(tiny_sd1, "unet")
    with pytest.raises(EditError, match=r"another base.*unet\.\S+ has shape .* the change"):
        slider.at(tiny_sdxl, 1.0)
    with pytest.raises(EditError, match=r"another base.*it has no unet"):
        slider.at(tiny_sd3, 1.0)
    absent = Slider("lost", {"unet": {"nowhere.to_q": change_of(nn.Linear(2, 2), 1, torch.Generator(), 1.0)}})
    with pytest.raises(EditError, match=r"no module nowhere\.to_q"):
        absent.at(tiny_sd1, 1.0)
    shape = tiny_sd1.text_encoder.embeddings.token_embedding.weight.shape
    change = ModuleChange(LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1])))
    embedding = Slider("words", {"text_encoder": {"embeddings.token_embedding": change}})
    with pytest.raises(EditError, match=r"a layer of kind Embedding"):
        embedding.at(tiny_sd1, 1.0)


def test_weights_of_another_training_are_refused(fresh_pipe: Callable[..., Any], tiny_sd1: Any) -> None:
    slider = random_slider(tiny_sd1, "unet")
    slider = dataclasses.replace(slider, details={"base": describe_base(tiny_sd1, ["unet"])})
    other = fresh_pipe("sd1", seed=3)
    with pytest.raises(EditError, match=r"another unet.*cosine .*allow_other_base"):
        slider.at(other, 1.0)
    slider.at(other, 1.0, allow_other_base=True)
    tuned = fresh_pipe("sd1")
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight += (
                0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            )
    slider.at(tuned, 1.0)


def test_silence_raises(tiny_sd1: Any) -> None:
    slider = random_slider(tiny_sd1, "unet", "text_encoder")
    with pytest.raises(EditError, match="unet, text_encoder, none of"), slider.at(tiny_sd1, 1.0):
        pass
    words = tiny_sd1.encode_prompt("a bar", "cpu", 1, True)
    with pytest.raises(EditError, match="changes text_encoder, none"), slider.at(tiny_sd1, 1.0):
        tiny_sd1(prompt_embeds=words[0], negative_prompt_embeds=words[1], num_inference_steps=1)
    with pytest.raises(KeyError), slider.at(tiny_sd1, 1.0):
        raise KeyError("what the block raises goes through")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_sd1.unet.modules())


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (float("nan"), "finite"),
        ([1.0, float("inf")], "finite"),
        ([], "shape"),
        ([[1.0]], "shape"),
        ("much", "not a scale"),
        (True, "not a scale"),
        (None, "not a scale"),
    ],
)
def test_scales_that_are_none(scale: Any, message: str, tiny_sd1: Any) -> None:
    with pytest.raises(EditError, match=message):
        random_slider(tiny_sd1, "unet", among=lambda path: "attn" in path).at(tiny_sd1, scale)


def test_other_bad_input(tiny_sd1: Any) -> None:
    slider = random_slider(tiny_sd1, "unet", among=lambda path: path.endswith("to_q"))
    for options in ({"start": 0.5, "stop": 0.5}, {"start": -0.1}, {"stop": 2.0}, {"start": float("nan")}):
        with pytest.raises(EditError, match="progress runs from 0"):
            slider.at(tiny_sd1, 1.0, **options)
    for region in (
        torch.full((4, 4), 2.0),
        torch.full((4, 4), float("nan")),
        torch.ones(4),
        torch.ones(0, 4),
    ):
        with pytest.raises(EditError, match="region"):
            slider.at(tiny_sd1, 1.0, region=region)
    with pytest.raises(EditError, match=r"3 scales.*given 4 rows"), slider.at(tiny_sd1, [1.0] * 3):
        draw(tiny_sd1)
    with pytest.raises(EditError, match="no slider"):
        together(tiny_sd1, [])
    with pytest.raises(EditError, match="changes nothing in transformer"):
        slider.only("transformer")
    with slider.at(tiny_sd1, 1.0) as active, pytest.raises(EditError, match="at work already"):
        draw(tiny_sd1)
        active.__enter__()


def test_a_scale_far_outside_the_safe_range_warns_with_the_figure(tiny_sd1: Any) -> None:
    slider = random_slider(tiny_sd1, "unet", among=lambda path: path.endswith("to_q"))
    slider = dataclasses.replace(slider, details={"measured": {"safe_range": [-1.0, 2.0]}})
    for scale, figure in ((9.0, "9"), (-4.5, "-4.5"), ([0.0, 7.0], "7")):
        with pytest.warns(UserWarning, match=rf"scale {figure} is far outside its safe range \[-1, 2\]"):
            slider.at(tiny_sd1, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slider.at(tiny_sd1, 2.0)
        slider.at(tiny_sd1, -1.2)
