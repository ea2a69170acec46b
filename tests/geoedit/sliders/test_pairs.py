"""Sliders from pictures at several levels: targets in closed form, folders, drawn pairs."""

import pytest
import torch
from PIL import Image

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.training.adapters import Adapters
from geoedit.sliders.training.pairs import ImagePairs, PairTask, push, shapes_pairs
from geoedit.sliders.training.settings import TrainSettings
from geoedit.testbeds.shapes.measure import measure
from geoedit.testbeds.shapes.world import ATTRIBUTES
from tests.geoedit.sliders.gaussian import SHAPE, gaussian_base

SMALL = TrainSettings(cache=3, kept=4, trajectory_steps=4, refresh=2, refresh_share=0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_mean_the_frozen_clean_latents_and_a_share_of_the_way(prediction):
    base = gaussian_base(prediction)
    images = torch.rand(6, 3, *SHAPE, generator=seeded())
    levels = torch.tensor([-1.0, 0.5, 3.0])
    task = PairTask(base, ImagePairs(images, levels))
    task.prepare(SMALL, seeded(1))
    kept = task.kept
    assert len(kept) == 24
    assert set(kept["scales"].tolist()) <= {-4.0, -2.5, -1.5, 1.5, 2.5, 4.0}
    assert torch.equal(kept["scales"][::2], -kept["scales"][1::2])
    latents, times = kept["latents"], kept["times"]
    change = base.clean(latents, times, kept["targets"]) - base.posterior(latents, times, base.mean)
    ways = {
        float(levels[b] - levels[a]): images[:, b] - images[:, a]
        for a in range(3)
        for b in range(3)
        if a != b
    }
    for row, scale in enumerate(kept["scales"].tolist()):
        off = (change[row] - push(base, 4) * ways[scale]).flatten(1).norm(dim=1)
        assert float(off.min()) < 1e-3  # one of the six things
    torch.testing.assert_close(change[::2], -change[1::2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampling_that_is_pushed_at_every_step_goes_the_whole_way(prediction):
    """Where the pictures leave a direction free (a wide normal distribution), scale 1 moves by one."""
    base = gaussian_base(prediction)
    base.covariance = 1e8 * torch.eye(12, dtype=torch.float64)
    way = torch.randn(SHAPE, generator=seeded(2), dtype=torch.float64)
    noise = torch.randn(3, *SHAPE, generator=seeded(3), dtype=torch.float64)
    told, plain = base.encode([""] * 3), base.predict

    def drawn():
        return base.sample(told, steps=12, guidance=1.0, noise=noise)[0]

    before = drawn()

    def pushed(latents, times, conditioning, **options):
        clean = base.clean(latents, times, plain(latents, times, conditioning))
        return base.output(latents, times, clean + push(base, 12) * way)

    base.predict = pushed
    torch.testing.assert_close(drawn() - before, way.expand(3, *SHAPE), rtol=0, atol=0.08)


def test_a_slider_that_says_so_has_no_loss(monkeypatch):
    base = gaussian_base("epsilon")
    images = torch.rand(4, 2, *SHAPE, generator=seeded())
    task = PairTask(base, ImagePairs(images, torch.tensor([0.0, 1.0])), batch_size=6)
    task.prepare(SMALL, seeded())
    batch = task.draw(0, seeded(3))
    assert len(batch) == 6
    with Adapters(task.components, {"unet": ["mid_block"]}, generator=seeded()):
        assert bool((task.loss(batch) > 0).all())
        monkeypatch.setattr(base, "predict", lambda *rest, **options: batch["targets"])
        assert not bool(task.loss(batch).any())
    assert "scale" in task.describe(batch, 1)
    assert "prompt ''" in task.describe(batch, 1)


def test_rows_are_made_anew_on_schedule_and_come_back_from_a_state():
    base = gaussian_base("epsilon")
    images = torch.rand(4, 2, *SHAPE, generator=seeded())
    made = [PairTask(base, ImagePairs(images, torch.tensor([0.0, 1.0]))) for _ in range(2)]
    for seed, task in enumerate(made):
        task.prepare(SMALL, seeded(seed))
    first = made[0].kept["latents"].clone()
    made[0].draw(1, seeded())
    assert torch.equal(made[0].kept["latents"], first)
    made[0].draw(2, seeded())
    assert torch.equal(made[0].kept["latents"][:12], first[12:])
    assert not torch.equal(made[0].kept["latents"][12:], first[:12])
    made[1].load_state({name: tensor.clone() for name, tensor in made[0].state().items()})
    again, other = (task.draw(3, seeded(5)) for task in made)
    assert all(torch.equal(again[name], other[name]) for name in again.tensors)
    with pytest.raises(EditError, match="it got none"):
        made[0].load_state({})


def test_pairs_train_every_family(tiny_pipe, device):
    base = base_of(tiny_pipe.to(device))
    pairs = ImagePairs(
        torch.rand(3, 2, 3, 16, 16, generator=seeded()), torch.tensor([-1.0, 1.0]), ("a bar",) * 3
    )
    task = PairTask(base, pairs, batch_size=4)
    task.prepare(SMALL, seeded())
    assert {task.prompts[int(row)] for row in task.kept["prompts"]} == {"", "a bar"}
    paths = [name for name, _ in base.denoiser.named_modules() if name.endswith("to_q")]
    with Adapters(task.components, {base.component: paths}, generator=seeded()) as adapters:
        loss = task.loss(task.draw(0, seeded())).mean()
        loss.backward()
        grown = adapters.pairs()[0][0].grad
        assert grown is not None and bool(grown.any()) and bool(grown.isfinite().all())


@pytest.mark.parametrize("attribute", ["size", "hue"])
def test_drawn_pairs_differ_in_one_attribute_by_their_levels(attribute):
    pairs = shapes_pairs(attribute, 4, levels=(-0.5, 0.5), generator=seeded(4))
    found = measure(pairs.images.flatten(0, 1)).values
    for name, values in found.items():
        step = values.reshape(4, 2).diff(dim=1)[:, 0] / ATTRIBUTES[name].natural_sd
        wanted = torch.full((4,), 1.0 if name == attribute else 0.0)
        held = (step - wanted).abs() < 0.02  # a shape at the end of the range stays there
        assert bool(held.all()) if name != attribute else int(held.sum()) >= 2
    words = {word for phrase in ATTRIBUTES[attribute].words for word in phrase.split()} - {"very"}
    assert len(pairs.prompts) == 4
    assert not any(words & set(prompt.split()) for prompt in pairs.prompts)
    with pytest.raises(EditError, match="no attribute 'age'"):
        shapes_pairs("age", 2, generator=seeded())


def picture(path, shade: int, side: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side, (shade, 0, 255)).save(path)


def test_a_folder_of_levels_is_read_in_order(tmp_path):
    for level, shade in (("1.5", 204), ("-1", 51)):
        for name in ("b", "a"):
            picture(tmp_path / level / f"{name}.png", shade, (16, 8))
    (tmp_path / "-1" / "a.txt").write_text("a red bar\n")
    (tmp_path / "notes").mkdir()
    pairs = ImagePairs.from_folder(tmp_path, size=(8, 8))
    assert pairs.levels.tolist() == [-1.0, 1.5]
    assert pairs.images.shape == (2, 2, 3, 8, 8)
    assert pairs.prompts == ("a red bar", "")
    torch.testing.assert_close(pairs.images[:, 0, 0].mean(), torch.tensor(0.2))
    torch.testing.assert_close(pairs.images[:, 1, 0].mean(), torch.tensor(0.8))


def test_bad_folders_and_pairs_are_refused(tmp_path, tiny_sd1):
    with pytest.raises(EditError, match="no folder"):
        ImagePairs.from_folder(tmp_path / "none")
    picture(tmp_path / "0" / "a.png", 0)
    with pytest.raises(EditError, match="1 folders named by numbers"):
        ImagePairs.from_folder(tmp_path)
    (tmp_path / "1").mkdir()
    with pytest.raises(EditError, match=r"level 1 of .* has no picture a"):
        ImagePairs.from_folder(tmp_path)
    (tmp_path / "1" / "a.png").write_bytes((tmp_path / "0" / "a.png").read_bytes()[:40])
    with pytest.raises(EditError, match=r"a\.png cannot be read as a picture"):
        ImagePairs.from_folder(tmp_path)
    images = torch.zeros(2, 2, 3, 8, 8)
    for wrong, levels, message in (
        (images, [1.0, 1.0], "do not rise"),
        (images + torch.nan, [0.0, 1.0], "NaN or not from 0 to 1"),
        (images + 255, [0.0, 1.0], "divide bytes by 255"),
        (images[:, :1], [0.0], "2 or more"),
        (images[:0], [0.0, 1.0], "0 things"),
        (images[:, :1], [0.0, 1.0], "1 pictures of each thing for 2 levels"),
    ):
        with pytest.raises(EditError, match=message):
            ImagePairs(wrong, torch.tensor(levels))
    with pytest.raises(EditError, match="1 prompts for 2 things"):
        ImagePairs(images, torch.tensor([0.0, 1.0]), ("a",))
    with pytest.raises(EditError, match=r"8 × 8 pixels have latents of shape .* Read them with size"):
        PairTask(base_of(tiny_sd1), ImagePairs(images, torch.tensor([0.0, 1.0]))).prepare(SMALL, seeded())
    with pytest.raises(EditError, match="batch_size is 1"):
        PairTask(base_of(tiny_sd1), ImagePairs(images, torch.tensor([0.0, 1.0])), batch_size=1)
    with pytest.raises(EditError, match="give a list of one or more"):
        PairTask(base_of(tiny_sd1), ImagePairs(images, torch.tensor([0.0, 1.0])), prompts=())
