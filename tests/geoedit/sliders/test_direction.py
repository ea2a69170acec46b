"""Bottlenecks of every family, directions in them, distilled and in files; discovery and dense matrices."""

import pytest
import torch
from torch import nn

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.bottleneck import Bottleneck, captured, find_bottleneck, shifted
from geoedit.sliders.discover import discover
from geoedit.sliders.training.adapters import Adapters
from geoedit.sliders.training.direction import Direction, DirectionTask, activation_direction, trajectories
from geoedit.sliders.training.settings import TrainSettings
from tests.geoedit.sliders.gaussian import gaussian_base

PLACES = {
    "UNet2DConditionModel": "mid_block",
    "SD3Transformer2DModel": "transformer_blocks.1",
    "FluxTransformer2DModel": "single_transformer_blocks.0",
}
SMALL = TrainSettings(cache=2, kept=3, trajectory_steps=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(base, rows: int = 2, seed: int = 0):
    latents = torch.randn(rows, *base.latent_shape(), generator=seeded(seed)).to(base.device)
    with torch.no_grad():
        return base.predict(
            latents, torch.full((rows,), 400.0).to(base.device), base.unconditional(rows), guidance=2.0
        )


def test_the_bottleneck_is_found_and_what_is_added_there_is_what_flows_on(tiny_pipe, device):
    base = base_of(tiny_pipe.to(device))
    place = find_bottleneck(base.denoiser)
    assert place.path == PLACES[type(base.denoiser).__name__]
    before = run(base)
    with captured(base.denoiser, place) as streams:
        assert torch.equal(run(base), before)
    change = torch.randn(streams[0][:1].shape, generator=seeded(1)).to(device)
    with shifted(base.denoiser, place, change), captured(base.denoiser, place) as moved:
        after = run(base)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(moved[0], streams[0] + change)
    with shifted(base.denoiser, place, torch.cat([change, 0 * change])):
        half = run(base)
    torch.testing.assert_close(half[0], after[0])
    torch.testing.assert_close(half[1], before[1])
    assert torch.equal(run(base), before)


def test_a_base_without_prompts_has_a_bottleneck_too(tiny_unconditional):
    found = discover(tiny_unconditional, count=2, samples=2, steps=3)
    assert [d.vector.shape for d in found] == [(32, 1, 1)] * 2
    task = DirectionTask(base_of(tiny_unconditional), found[0], batch_size=2)
    task.prepare(SMALL, seeded())
    assert task.draw(0, seeded())["targets"].shape == (2, 3, 8, 8)


def test_bad_places_and_changes_are_refused(tiny_sd1):
    base = base_of(tiny_sd1)
    with pytest.raises(EditError, match="neither a middle block"):
        find_bottleneck(nn.Linear(2, 2))
    with pytest.raises(EditError, match="no module 'middle'"), captured(base.denoiser, Bottleneck("middle")):
        pass
    place = Bottleneck("mid_block")
    with pytest.raises(EditError, match="never ran"), captured(base.denoiser, place):
        pass
    with (
        pytest.raises(EditError, match="one of another model"),
        shifted(base.denoiser, place, torch.ones(1, 7, 1, 1)),
    ):
        run(base)
    with (
        pytest.raises(EditError, match="3 rows does not fit a pass of 2"),
        shifted(base.denoiser, place, torch.ones(3, 32, 1, 1)),
    ):
        run(base)
    for vector, message in (
        (torch.zeros(3), "is zero"),
        (torch.tensor([torch.nan]), "not finite"),
        (torch.ones(0), "empty"),
    ):
        with pytest.raises(EditError, match=message):
            Direction("x", vector, place)


def test_a_direction_comes_back_from_its_file_to_the_bit(tmp_path):
    direction = Direction(
        "big", torch.randn(4, 1, 1, generator=seeded()), Bottleneck("a.b", "input"), {"value": 2.5}
    )
    direction.save(tmp_path / "big.safetensors")
    again = Direction.load(tmp_path / "big.safetensors")
    assert (again.name, again.bottleneck, again.details) == ("big", direction.bottleneck, {"value": 2.5})
    assert torch.equal(again.vector, direction.vector)
    content = (tmp_path / "big.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-3])
    (tmp_path / "none.safetensors").write_bytes(content.replace(b"geoedit.direction", b"geoedit.something"))
    for name, message in (("cut", "cut off or damaged"), ("none", "no direction"), ("missing", "no file")):
        with pytest.raises(EditError, match=message):
            Direction.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(EditError, match="does not exist"):
        direction.save(tmp_path / "no" / "big.safetensors")


def by_hand(module, side, change):
    if side == "output":
        return module.register_forward_hook(lambda module, inputs, output: output + change)
    return module.register_forward_pre_hook(
        lambda module, inputs, named: (inputs, {**named, "hidden_states": named["hidden_states"] + change}),
        with_kwargs=True,
    )


def test_the_teacher_is_the_frozen_model_with_the_direction_added(tiny_pipe):
    base = base_of(tiny_pipe)
    place = find_bottleneck(base.denoiser)
    with captured(base.denoiser, place) as streams:
        run(base, 1)
    direction = Direction("way", torch.randn(streams[0].shape[1:], generator=seeded()), place)
    task = DirectionTask(base, direction, prompts=["a bar", ""], batch_size=4)
    task.prepare(SMALL, seeded(1))
    kept = task.kept
    assert len(kept) == 12
    assert torch.equal(kept["scales"][::2], -kept["scales"][1::2])
    assert torch.equal(kept["latents"][::2], kept["latents"][1::2])
    for row in (0, 5):
        module = base.denoiser.get_submodule(place.path)
        handle = by_hand(module, place.side, float(kept["scales"][row]) * direction.vector)
        told = base.encode([task.prompts[int(kept["prompts"][row])]])
        with torch.no_grad():
            wanted = base.predict(
                kept["latents"][[row]], kept["times"][[row]], told, guidance=SMALL.trajectory_guidance
            )
        handle.remove()
        torch.testing.assert_close(kept["targets"][[row]], wanted, rtol=1e-4, atol=1e-4)
    paths = [name for name, _ in base.denoiser.named_modules() if name.endswith(("to_q", "to_out.0"))]
    with Adapters(task.components, {base.component: paths}, generator=seeded()) as adapters:
        task.loss(task.draw(0, seeded())).mean().backward()
        assert any(bool(up.grad.any()) for up, _ in adapters.pairs())


def test_the_empty_direction_of_no_scale_leaves_the_trajectory(tiny_sd1):
    base = base_of(tiny_sd1)
    direction = Direction("way", torch.ones(32, 1, 1), Bottleneck("mid_block"))
    options = {"samples": 2, "steps": 3, "guidance": 2.0}
    plain, times, which = trajectories(base, ["a bar"], **options, generator=seeded())
    same, _, _ = trajectories(
        base, ["a bar"], **options, generator=seeded(), direction=direction, scales=torch.tensor([0.0, 1.0])
    )
    assert plain.shape == (2, 3, *base.latent_shape())
    assert times.shape == (3,) and which.tolist() == [0, 0]
    torch.testing.assert_close(same[0], plain[0])
    assert not torch.allclose(same[1, -1], plain[1, -1])


def test_activations_give_the_mean_difference(tiny_sd1):
    base = base_of(tiny_sd1)
    words = (["a large bar", "a large shape"], ["a small bar", "a small shape"])
    found = activation_direction(base, *words, samples=2, steps=2, guidance=1.0, generator=seeded())
    latents, times, _ = trajectories(base, [""], samples=2, steps=2, guidance=1.0, generator=seeded())
    total = torch.zeros(32)
    for row in range(2):
        for step in range(2):
            for sign, said in ((1, words[0][row]), (-1, words[1][row])):
                with torch.no_grad(), captured(base.denoiser, Bottleneck("mid_block")) as streams:
                    base.predict(latents[[row], step], times[[step]], base.encode([said]))
                total += sign * streams[0][0].mean((1, 2)) / 8
    torch.testing.assert_close(found.vector[:, 0, 0], total, rtol=1e-3, atol=1e-5)
    assert found.name == "a large bar"
    with pytest.raises(EditError, match="2 positive and 1 negative"):
        activation_direction(base, words[0], ["a"], generator=seeded())


def jacobian(function, count: int) -> torch.Tensor:
    """Central differences in double precision, a column an input."""
    step, columns = 1e-4, []
    for unit in torch.eye(count, dtype=torch.float64):
        with torch.no_grad():
            columns.append((function(step * unit) - function(-step * unit)) / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("metric", ["output", "bottleneck"])
def test_discovered_directions_are_those_of_the_dense_jacobian(metric):
    """The base is linear: latents go through its layer W, and what comes out of W through the rest."""
    base = gaussian_base("epsilon")
    generator = seeded(5)
    seen = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    base.denoiser.mid_block.weight.data = seen
    found = discover(
        base, count=3, metric=metric, samples=2, steps=5, pooled=False, tolerance=1e-6, effect=0.5
    )
    time = torch.tensor([found[0].details["time"]], dtype=torch.float64)
    latents = torch.randn(1, *base.latent_shape(), generator=generator, dtype=torch.float64)

    def rest(change: torch.Tensor) -> torch.Tensor:
        with shifted(base.denoiser, Bottleneck("mid_block"), change[None]):
            output = base.predict(latents, time, base.encode([""]))
        return base.clean(latents, time, output).flatten()

    to_output = jacobian(rest, 12)
    if metric == "output":
        values, basis = torch.linalg.svd(to_output / 12**0.5)[1:]
    else:
        values, basis = torch.linalg.svd(seen.mT)[1:]
    for index, direction in enumerate(found):
        assert direction.details["value"] == pytest.approx(float(values[index]), rel=1e-3)
        unit = direction.vector / direction.vector.norm()
        assert abs(float(unit @ basis[index])) == pytest.approx(1.0, abs=1e-4)
        moved = to_output @ direction.vector
        assert float(moved.square().mean().sqrt()) > 0
    sizes = [float((to_output @ d.vector).norm()) for d in found]
    torch.testing.assert_close(sizes, [sizes[0]] * 3, rtol=1e-3, atol=0)  # scale 1 means the same for all


def test_discovery_of_a_network_agrees_with_differences(tiny_sd1):
    found = discover(tiny_sd1, count=1, samples=1, steps=2, at=0.5, effect=2.5e-4)[0]
    again = discover(tiny_sd1, count=1, samples=1, steps=2, at=0.5, effect=2.5e-4)[0]
    assert torch.equal(found.vector, again.vector)
    base = base_of(tiny_sd1)
    latents, times, _ = trajectories(base, [""], samples=1, steps=2, guidance=3.0, generator=seeded())
    assert float(times[1]) == found.details["time"]

    def clean(change: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), shifted(base.denoiser, found.bottleneck, change[None, :, None, None]):
            output = base.predict(latents[:, 1], times[1:], base.unconditional(1))
        return base.clean(latents[:, 1], times[1:], output)

    spread = clean(torch.zeros(32)).std()
    step = found.vector.flatten()
    change = (clean(step) - clean(-step)) / 2
    torch.testing.assert_close(
        change.square().mean().sqrt() / spread, torch.tensor(2.5e-4), rtol=0.02, atol=0
    )
    other = torch.randn(32, generator=seeded(2))
    other *= found.vector.norm() / other.norm()
    assert (clean(other) - clean(-other)).norm() < 2 * change.norm()


def test_bad_questions_of_discovery_are_refused(tiny_sd1):
    for options, message in (
        ({"at": 1.0}, "at is 1.0"),
        ({"metric": "fisher"}, "metric is 'fisher'"),
        ({"effect": float("nan")}, "effect is nan"),
        ({"count": 33, "samples": 1, "steps": 1}, "count is 33; .* 32 directions that are alike"),
        ({"samples": 0}, "nothing to draw"),
    ):
        with pytest.raises(EditError, match=message):
            discover(tiny_sd1, **options)
