"""Evaluations: images are the pipeline's own, and numbers are those of a truth that the test draws."""

import json
import math

import numpy as np
import pytest
import torch

from geoedit import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation import COLUMNS, Evaluation, GenericMeasure, evaluate, prepare
from geoedit.sliders.evaluation.claims import claim, prompting, worded, written
from geoedit.sliders.evaluation.drawing import How, Painter, Row
from geoedit.sliders.evaluation.measures import ShapesWithResidual, draws_shapes, instrument
from geoedit.testbeds.shapes.pipelines import new_autoencoder, new_pipeline
from tests.geoedit.sliders.drawn import Drawn, hand_made

PROMPTS = ["a bar", "an ellipse"]
SCALES = (-2, -1, -0.5, 0, 0.5, 1, 2)


@pytest.fixture(scope="module")
def shapes_pipe():
    """Random weights: only its words and sizes are asked, `Drawn` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_pipeline("unet", new_autoencoder())


@pytest.fixture(scope="module")
def truth(shapes_pipe):
    """Size moves as it should, hue a quarter of it along; thickness up and down without direction."""

    def rule(label, scale):
        if label == "wrong":
            return {"size": scale**2}
        return {"size": 0.5 * scale, "hue": 0.125 * scale}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "Painter", Drawn)
        patch.setattr(Drawn, "rule", staticmethod(rule))
        first, second = hand_made(shapes_pipe), hand_made(shapes_pipe, seed=1)
        return evaluate(
            shapes_pipe,
            {"size": first, "wrong": second},
            prompts=PROMPTS,
            seeds=2,
            scales=SCALES,
            attributes={"wrong": "size"},
            compositions=[[first @ 1, second @ 1]],
            safe_range=False,
        )


def whole(evaluation, label, method="slider"):
    table = evaluation.table
    row = table[(table["slider"] == label) & (table["method"] == method) & (table["seed"] == "all")]
    return row.iloc[0]


def test_a_true_slider_gets_the_numbers_of_its_truth(truth):
    row = whole(truth, "size")
    assert row["spearman"] == pytest.approx(1) and row["violations"] == 0 and row["foldback"] == 0
    assert (row["low"], row["high"]) == (-1, 1) and row["found"] == 1 and row["class_kept"] == 1
    assert row["range_sd"] == pytest.approx(1.0, abs=0.02)
    assert row["low_sd"] == pytest.approx(-0.5, abs=0.02)
    assert bool(row["both_ends_right"]) and row["ends_right_share"] == 1
    assert math.isnan(row["saturation_high"]) and row["residual"] < 0.03
    assert truth.interference.loc["size", "hue"] == pytest.approx(0.25, abs=0.01)
    assert truth.interference_signed.loc["size", "size"] == pytest.approx(1)
    assert row["interference_worst"] == pytest.approx(0.25, abs=0.01)


def test_a_slider_that_grows_at_both_ends_is_found_out(truth):
    row = whole(truth, "wrong")
    assert not row["both_ends_right"] and row["ends_right_share"] == 0
    assert row["violations"] == pytest.approx(0.5) and row["foldback"] == pytest.approx(0.5, abs=0.02)
    assert abs(row["spearman"]) < 0.2


def test_prompting_is_measured_beside(truth):
    row = whole(truth, "size", "prompting")
    assert row["range_sd"] == pytest.approx(1.0, abs=0.02) and row["both_ends_right"]
    assert set(truth.table["method"]) == {"slider", "prompting"}


def test_every_row_of_the_table_is_there(truth):
    table = truth.table
    assert list(table["seed"]) == [0, 1, "all"] * 4 and set(table.columns) <= set(COLUMNS)
    assert len(truth.curves) == 2 * 2 * (2 * len(SCALES) + 2 * 3)
    assert truth.curves["distance"][truth.curves["scale"] == 0].max() == 0


def test_the_sum_of_what_members_do(truth):
    first, second = truth.additivity.to_dict("records")
    # 0.5 and 1 apart are 1.5 together: the truth is additive
    assert first["apart"] == pytest.approx(1.5, abs=0.03) and abs(first["error"]) < 0.03
    assert (second["slider"], second["sliders"]) == ("wrong", 2)


def test_a_file_gives_back_the_evaluation(truth, tmp_path):
    again = Evaluation.load(truth.to_json(tmp_path / "found.json"))
    assert again.table.equals(truth.table) and again.interference.equals(truth.interference)
    (tmp_path / "cut.json").write_text((tmp_path / "found.json").read_text()[:500])
    data = json.loads((tmp_path / "found.json").read_text())
    del data["claims"]
    (tmp_path / "less.json").write_text(json.dumps(data))
    (tmp_path / "other.json").write_text("[]")
    for name in ("cut", "less", "other", "none"):
        with pytest.raises(EditError, match=name):
            Evaluation.load(tmp_path / f"{name}.json")
    with pytest.raises(EditError, match="does not exist"):
        truth.to_html(tmp_path / "nowhere" / "page.html")


@pytest.mark.parametrize("name", ["curves", "interference"])
def test_figures_are_drawn(truth, name, tmp_path):
    truth.figure(name).savefig(tmp_path / "figure.png")
    with pytest.raises(EditError, match="no figure"):
        truth.figure("nothing")


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_images_are_the_pipelines_own(family, request):
    pipe = request.getfixturevalue(f"tiny_{family}")
    slider = hand_made(pipe, size=3.0)
    painter = Painter(base_of(pipe), {"a": slider}, How(3, 2.0))
    rows = [Row("a bar", 5, {}), Row("a bar", 5, {"a": 1.5}), Row("an ellipse", 6, {"a": -1.0})]
    ours = painter.draw(rows)
    for row, image in zip(rows, ours, strict=True):
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
        with slider.at(pipe, row.scales.get("a", 0.0)) if row.scales else torch.no_grad():
            theirs = pipe(row.prompt, generator=torch.Generator().manual_seed(row.seed), **options).images[0]
        assert (theirs * 255 - image).abs().max() <= 0.51
    assert (ours[0].int() - ours[1].int()).abs().max() > 1


def test_a_cut_run_goes_on_where_it_stood(tiny_sd1, tmp_path, monkeypatch):
    base, slider = base_of(tiny_sd1), hand_made(tiny_sd1)
    rows = [
        Row("a bar", seed, {"a": scale} if scale else {}) for seed in (0, 1) for scale in (-1.0, 0.0, 1.0)
    ]

    def painter(**options):
        return Painter(base, {"a": slider}, How(2, 1.0, batch_size=2, **options), cache=tmp_path)

    once = painter().draw(rows)
    next(tmp_path.glob("*.png")).write_bytes(b"cut off")
    drawn = []
    sample = base.sample
    monkeypatch.setattr(
        base, "sample", lambda *args, **kw: drawn.append(len(kw["noise"])) or sample(*args, **kw)
    )
    assert torch.equal(painter().draw(rows), once) and drawn == [1]  # the damaged one
    painter(start=0.5).draw(rows)  # another window, other pictures; without the slider the same
    assert sum(drawn) == 1 + 4


def test_measures_have_their_units(shapes_pipe, tiny_sd1):
    assert draws_shapes(shapes_pipe) and not draws_shapes(tiny_sd1)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tool = instrument(None, tiny_sd1, lambda: images)
    luma = (images * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1).mean((1, 2))
    torch.testing.assert_close(tool.read(images).values["mean luma"], luma)
    assert tool.natural_sd["mean luma"] == pytest.approx(float(luma.std()), rel=1e-5)
    assert isinstance(instrument(None, shapes_pipe, lambda: images).measure, ShapesWithResidual)


def test_a_measure_of_ones_own(tiny_sd1, device):
    def left(images):
        return {"left": images[..., :8].mean((1, 2, 3)), "residual": images.std((1, 2, 3))}

    found = evaluate(
        tiny_sd1.to(device), hand_made(tiny_sd1, "a"), prompts="a bar", seeds=[3], scales=[-1, 0, 1], steps=2,
        measure=left, safe_range=False,
    )  # fmt: skip
    tiny_sd1.to("cpu")
    row = found.table.iloc[-1]
    assert row["claim"] == "largest effect" and row["attribute"] in ("left", "-left")
    assert np.isfinite(row["range_sd"]) and found.claims["a"].attribute == "left"


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda images: images.mean((1, 2, 3)), "mapping"),
        (lambda images: {"a": images.mean()}, "shape"),
        (lambda images: {"a": torch.zeros(len(images))}, "does not vary"),
    ],
)
def test_measures_that_cannot_be_used_are_refused(measure, message, tiny_sd1):
    with pytest.raises(EditError, match=message):
        instrument(measure, tiny_sd1, lambda: torch.rand(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [1, 2]}, "lack 0"),
        ({"scales": [0, math.nan]}, "finite"),
        ({"seeds": []}, "seeds"),
        ({"seeds": 0}, "seeds"),
        ({"prompts": []}, "prompts"),
        ({"attributes": {"other": "size"}}, "names 'other'"),
        ({"attributes": {"size": "colour"}}, "colour"),
        ({"words": {"size": ("", "")}}, "two texts"),
        ({"steps": 0}, "steps"),
        ({"start": 0.9, "stop": 0.2}, "start"),
    ],
)
def test_bad_arguments_are_refused(options, message, tiny_sd1):
    given = {
        "prompts": ["a bar"],
        "seeds": [0],
        "scales": [-1, 0, 1],
        "measure": GenericMeasure(),
        "steps": 1,
    }
    if options.get("attributes") == {"size": "colour"}:
        given["measure"].natural_sd = dict.fromkeys(given["measure"](torch.rand(2, 3, 8, 8)), 1.0)
    with pytest.raises(EditError, match=message):
        evaluate(tiny_sd1, hand_made(tiny_sd1), **{**given, **options})


def test_no_slider_is_refused(tiny_sd1):
    for nothing in ([], {}):
        with pytest.raises(EditError, match="sliders"):
            evaluate(tiny_sd1, nothing, prompts=["a bar"])


def test_what_a_slider_claims(tiny_sd1):
    names = ["size", "hue"]
    spec = {"positive": "a very {hue} thin bar", "negative": "a large bar", "action": "enhance"}

    def told(given=None, name="x", **details):
        return claim(name, hand_made(tiny_sd1, name, **details), names, given, shapes=True)

    assert told("-size").sign == -1 and told("size").source == "given"
    assert told(name="hue").attribute == "hue" and told() is None
    assert told(spec={**spec, "negative": "a thick bar"}) is None  # thickness is not read
    small_first = told(spec={"positive": "a small bar", "negative": "a large bar"})
    assert (small_first.attribute, small_first.sign) == ("size", -1)
    erased = told(spec={"positive": "a small bar", "negative": "a large bar", "action": "erase"})
    assert erased.sign == 1


def test_words_go_where_captions_have_them():
    assert worded("a very small red bar on the left", "thick") == "a very small thick red bar on the left"
    assert worded("a bar on the left", "rising") == "a bar rising on the left"
    assert worded("a shape", "on the right") == "a shape on the right"
    with pytest.raises(EditError, match="no word"):
        worded("a bar", "huge")
    assert written("photo of a cat", "{}, an old cat", target="a cat") == "photo of an old cat"
    assert written("photo of a dog", "{}, an old cat", target="a cat") == "photo of a dog, an old cat"


def test_words_of_a_spec_ask_for_its_ends(tiny_sd1):
    slider = hand_made(tiny_sd1, spec={"positive": "an old {hue} cat", "negative": "a young cat"})
    assert prompting("a", slider, None, {}, shapes=False) == ("{}, a young cat", "{}, an old cat")
    assert prompting("a", hand_made(tiny_sd1), None, {}, shapes=False) is None
