"""Text sliders: targets against the pipeline's own denoiser, and what the loop promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.slider import Slider
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import Adapters
from geoedit.sliders.training.published import PublishedTask
from geoedit.sliders.training.run import train
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.targets import target_paths
from geoedit.sliders.training.text import TextTask

SPEC = SliderSpec(
    name="size",
    target="a {hue} shape",
    positive="a large {hue} shape",
    negative="a small {hue} shape",
    preserve={"hue": ["red", "blue"]},
    unrelated=["the digit one"],
)
QUICK: dict[str, Any] = {
    "targets": "attn", "rank": 2, "cache": 2, "trajectory_steps": 3, "kept": 3, "warmup": 0, "show": False,
}  # fmt: skip
SETTINGS = {name: value for name, value in QUICK.items() if name != "show"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(pipe: Any, generator: torch.Generator, **settings: Any) -> tuple[TextTask, Any]:
    task = TextTask(base_of(pipe), SPEC, batch_size=8)
    adapters = Adapters(
        task.components,
        {name: target_paths(module, "attn") for name, module in task.components.items()},
        generator=generator,
    )
    task.prepare(TrainSettings(**{**SETTINGS, **settings}), generator)
    return task, adapters


@pytest.mark.parametrize("rescale", [False, True])
def test_a_row_is_taught_the_scaled_difference_of_its_ends(tiny_pipe: Any, rescale: bool) -> None:
    base = base_of(tiny_pipe)
    task, adapters = prepared(tiny_pipe, seeded(), rescale=rescale, guidance=1.5, preserve_rows=0.5)
    batch = task.draw(0, seeded(1))
    adapters.remove()
    assert len(batch) == 10  # four latents at both signs, two that stay
    with torch.no_grad():
        for row in range(10):
            prompt = task.prompts[int(batch["prompt"][row])]
            latents, time = batch["latents"][row : row + 1], batch["times"][row : row + 1]
            ends = {
                word: base.predict(latents, time, base.encode([text]), guidance=3.0)
                for word, text in {
                    "neutral": prompt,
                    "positive": prompt.replace("a ", "a large ", 1),
                    "negative": prompt.replace("a ", "a small ", 1),
                }.items()
            }
            wanted = ends["neutral"]
            if row < 8:
                assert prompt in ("a red shape", "a blue shape")
                scale = float(batch["scales"][row])
                wanted = wanted + 1.5 * scale * (ends["positive"] - ends["negative"])
                if rescale:
                    wanted = wanted * ends["neutral"].norm() / wanted.norm()
            else:
                assert prompt == "the digit one"
            torch.testing.assert_close(batch["target"][row : row + 1], wanted, rtol=1e-4, atol=1e-5)


def test_both_signs_of_each_latent_stand_in_a_batch(tiny_sd1: Any) -> None:
    task, adapters = prepared(tiny_sd1, seeded(), scale_max=1.5, preserve=0.0)
    batch = task.draw(0, seeded(1))
    adapters.remove()
    scales = batch["scales"]
    assert torch.equal(scales[0::2], -scales[1::2])
    assert bool(((scales[0::2] > 0) & (scales[0::2] <= 1.5)).all())
    assert torch.equal(batch["latents"][0::2], batch["latents"][1::2])


def test_weights_are_min_snr(tiny_sd1: Any) -> None:
    task, adapters = prepared(tiny_sd1, seeded(), min_snr=2.0, preserve=3.0)
    batch = task.draw(0, seeded(1))
    adapters.remove()
    kept = tiny_sd1.scheduler.alphas_cumprod[batch["times"].long()]
    ratio = kept / (1 - kept)
    wanted = ratio.clamp_max(2.0) / ratio
    wanted[8:] *= 3.0
    torch.testing.assert_close(batch["weight"], wanted, rtol=1e-5, atol=0)


def test_part_of_the_refreshed_latents_are_the_sliders_own(tiny_sd1: Any) -> None:
    found = []
    for share in (0.0, 1.0):
        generator = seeded()
        task, adapters = prepared(tiny_sd1, generator, refresh=1, refresh_share=0.5, on_policy=share)
        for up, _ in adapters.pairs():
            up.data.fill_(0.5)
        before = task.cache["latents"].clone()
        task.draw(1, generator)
        adapters.remove()
        assert torch.equal(task.cache["latents"][:3], before[3:])  # the newer half of two trajectories
        found.append(task.cache["latents"][3:])
    assert torch.equal(found[0][0], found[1][0])  # the same noise
    assert not torch.equal(found[0][1:], found[1][1:])


def test_every_family_is_trained_and_left_as_it_was(tiny_pipe: Any, tmp_path: Path) -> None:
    base = base_of(tiny_pipe)
    state = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    randomness = torch.random.get_rng_state()
    slider = train(
        tiny_pipe, SPEC, steps=2, batch_size=4, generator=seeded(), output=tmp_path, sample_every=2, **QUICK
    )
    assert torch.equal(torch.random.get_rng_state(), randomness)
    assert isinstance(slider, Slider)
    assert set(slider.changes) == {base.component}
    after = base.denoiser.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert slider.details["settings"]["steps"] == 2
    assert SliderSpec.from_dict(slider.details["spec"]) == SPEC
    assert (tmp_path / "size.safetensors").is_file()
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    with slider.at(tiny_pipe, 1.0):
        tiny_pipe(
            "a shape", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0)
        )


def tensors(slider: Slider) -> list[torch.Tensor]:
    return [factor for _, _, change in slider for factor in (change.matrix.left, change.matrix.right)]


def same(one: Slider, other: Slider) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_too(tiny_sd1: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {**QUICK, "refresh": 2, "average": 0.5, "batch_size": 4}
    whole = train(tiny_sd1, SPEC, steps=3, generator=seeded(), **asked)
    assert same(train(tiny_sd1, SPEC, steps=3, generator=seeded(), **asked), whole)
    assert not same(train(tiny_sd1, SPEC, steps=3, generator=seeded(1), **asked), whole)
    train(tiny_sd1, SPEC, steps=2, generator=seeded(), output=tmp_path, **asked)
    resumed = train(tiny_sd1, SPEC, steps=3, generator=seeded(9), output=tmp_path, **asked)
    assert same(resumed, whole)
    assert same(train(tiny_sd1, SPEC, steps=3, output=tmp_path, **asked), whole)  # nothing left to do
    with pytest.raises(EditError, match="rank was 2 and is now 3"):
        train(tiny_sd1, SPEC, steps=3, output=tmp_path, **{**asked, "rank": 3})
    with pytest.raises(EditError, match="more than the 2"):
        train(tiny_sd1, SPEC, steps=2, output=tmp_path, **asked)


def test_a_batch_in_parts_is_the_same_batch(tiny_sd1: Any) -> None:
    asked: dict[str, Any] = {**QUICK, "steps": 1, "batch_size": 8}
    whole = train(tiny_sd1, SPEC, generator=seeded(), **asked)
    parts = train(tiny_sd1, SPEC, generator=seeded(), accumulate=3, checkpointing=True, **asked)
    for ours, theirs in zip(tensors(parts), tensors(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "low_rank_adam"},
        {"autocast": "bfloat16"},
        {"decay": "cosine", "scale_law": "ends"},
        {"bipolar": False, "preserve": 0.0},
        {"published": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_loss_falls(fresh_pipe: Callable[..., Any], device: torch.device, options: dict) -> None:
    pipe = fresh_pipe("sd1").to(device)
    losses: list[float] = []
    task_of = PublishedTask if options.get("published") else TextTask
    settings = TrainSettings(**{**SETTINGS, **options})
    task = task_of(base_of(pipe), SPEC, batch_size=8)
    loss = task.loss

    def watched(batch: Any) -> torch.Tensor:
        rows = loss(batch)
        losses.append(float(rows.detach().mean() / batch["target"].square().mean()))
        return rows

    task.loss = watched  # type: ignore[method-assign]
    slider = train(pipe, SPEC, steps=12, generator=seeded(), settings=settings, task=task, show=False)
    assert all(tensor.device.type == device.type for tensor in tensors(slider))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_loss_that_is_no_number_stops_and_keeps_the_state_before(
    fresh_pipe: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = fresh_pipe("sd1")
    task = TextTask(base_of(pipe), SPEC, batch_size=4)
    loss, calls = task.loss, []

    def poisoned(batch: Any) -> torch.Tensor:
        calls.append(1)
        return loss(batch) * (float("nan") if len(calls) == 4 else 1.0)

    task.loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(EditError, match=r"step 3: .*timestep \d+, scale .*prompt 'a (red|blue) shape'"):
        train(pipe, SPEC, steps=4, batch_size=4, generator=seeded(), output=tmp_path, task=task, **QUICK)
    resumed = train(pipe, SPEC, steps=4, batch_size=4, output=tmp_path, **QUICK)
    assert same(resumed, train(pipe, SPEC, steps=4, batch_size=4, generator=seeded(), **QUICK))


def test_options_that_are_not_there_are_told(tiny_sd1: Any, tiny_unconditional: Any) -> None:
    with pytest.raises(EditError, match="option 'learning' is unknown"):
        train(tiny_sd1, SPEC, learning=1.0)
    with pytest.raises(EditError, match="steps is 0"):
        train(tiny_sd1, SPEC, steps=0)
    with pytest.raises(EditError, match="rank is 0"):
        train(tiny_sd1, SPEC, rank=0)
    with pytest.raises(EditError, match="takes no prompts"):
        train(tiny_unconditional, SPEC, steps=1, **{**QUICK, "targets": "full"})
    with pytest.raises(EditError, match="needs its tokenizer"):
        train(tiny_sd1.unet, SPEC)
    with pytest.raises(EditError, match="for a language model"):
        train(tiny_sd1, SliderSpec(kind="language", target="a", positive="b", negative="c"))


def test_a_specs_own_settings_come_before_the_defaults_and_after_the_callers(tiny_sd1: Any) -> None:
    spec = SliderSpec(
        target="a bar", positive="a large bar", negative="a small bar", train={"rank": 3, "steps": 1}
    )
    slider = train(tiny_sd1, spec, **{key: value for key, value in QUICK.items() if key != "rank"})
    assert (slider.details["settings"]["rank"], slider.details["settings"]["steps"]) == (3, 1)
    assert train(tiny_sd1, spec, **QUICK).details["settings"]["rank"] == 2
