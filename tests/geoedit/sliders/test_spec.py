"""Specs: what is completed, what is refused, and the published trainer's files as they are."""

from pathlib import Path

import pytest

from geoedit.errors import EditError
from geoedit.sliders.spec import Prompts, SliderSpec, fill
from geoedit.sliders.training.settings import TrainSettings

ENDS = {"target": "a shape", "positive": "a large shape", "negative": "a small shape"}

PUBLISHED = """\
- target: "male person" # what word for erasing the positive concept from
  positive: "male person, very old" # concept to erase
  unconditional: "male person, very young"
  neutral: "male person" # starting point for conditioning the target
  action: "enhance" # erase or enhance
  guidance_scale: 4
  resolution: 512
  dynamic_resolution: false
  batch_size: 2
- target: ' female  black person'
  positive: ' female  black person, very old'
  unconditional: ''
  guidance: 3
  rank: 4
  action: enhance
  dynamic_resolution: true
"""
CONFIG = """\
prompts_file: "trainscripts/textsliders/data/prompts.yaml"
pretrained_model:
  name_or_path: "CompVis/stable-diffusion-v1-4"
  v2: false
  v_pred: false
network:
  type: "c3lier" # or "c3lier" or "lierla"
  rank: 8
  alpha: 1.0
  training_method: "noxattn"
train:
  precision: "bfloat16"
  noise_scheduler: "ddim"
  iterations: 700
  lr: 0.0002
  optimizer: "AdamW"
  lr_scheduler: "constant"
  max_denoising_steps: 40
save:
  name: "age"
  path: "./models"
  per_steps: 500
  precision: "bfloat16"
logging:
  use_wandb: false
  verbose: false
other:
  use_xformers: true
"""


def test_a_spec_completes_itself() -> None:
    spec = SliderSpec(**ENDS)
    assert (spec.kind, spec.neutral, spec.name) == ("text", "a shape", "a-large-shape")
    assert SliderSpec(neutral="x", positive="y", negative="z").target == "x"
    assert SliderSpec(pairs="folder").kind == "pairs"
    assert SliderSpec(direction={"file": "d.safetensors"}).kind == "direction"


def test_contexts_are_all_combinations_in_every_prompt() -> None:
    spec = SliderSpec(
        target="a {hue} {noun}",
        positive="a large {hue} {noun}",
        negative="a small {hue} {noun}",
        preserve={"hue": ["", "orange"], "noun": ["bar", "ellipse"]},
        more=[Prompts("a digit", "a thick digit", "a thin digit", "a digit")],
    )
    found = list(spec.contexts())
    assert len(found) == 8
    assert [c.target for c in found[:4]] == ["a bar", "an ellipse", "an orange bar", "an orange ellipse"]
    assert found[2].positive == "a large orange bar"
    assert found[4].positive == "a bar thick digit"  # without a place the words follow the article


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        ("person, smiling", {"": "old"}, "old person, smiling"),
        ("  spaces  stay ", {}, "  spaces  stay "),
        ("a {} shape", {"": "red"}, "a red shape"),
        ("an {x} bar", {"x": "red"}, "a red bar"),
        ("", {"": "old"}, "old"),
        ("the bar", {"": "red"}, "the red bar"),
    ],
)
def test_words_take_their_places(prompt: str, words: dict[str, str], expected: str) -> None:
    assert fill(prompt, words) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": ""}, "'positive' is an empty prompt"),
        ({"negative": "  "}, "'negative' is an empty prompt"),
        ({"target": ""}, "'target' is an empty prompt"),
        ({"negative": "a large shape"}, "both 'a large shape'"),
        ({"positive": None}, "'positive' is missing"),
        ({"positive": "a large {hue} shape"}, "placeholder {hue}"),
        ({"guidance": 0.0}, "guidance is 0"),
        ({"kind": "sound"}, "'sound'"),
        ({"action": "grow"}, "'grow'"),
        ({"preserve": "red"}, "give a list"),
        ({"preserve": {"hue": []}}, "has no words"),
        ({"unrelated": "a digit"}, "give a list"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change: dict, message: str) -> None:
    with pytest.raises(EditError, match=message.replace("{", r"\{").replace("}", r"\}")):
        SliderSpec(**{**ENDS, **change})


def test_our_yaml_comes_back_as_it_was(tmp_path: Path) -> None:
    spec = SliderSpec(
        **ENDS,
        name="size",
        guidance=2.0,
        preserve={"hue": ("", "red", "grün")},
        unrelated=("", "the digit one"),
        more=(Prompts("a", "b", "c", "a", "erase", 3.0),),
        train={"rank": 8, "steps": 50},
    )
    spec.save(tmp_path / "size.yaml")
    assert SliderSpec.load(tmp_path / "size.yaml") == spec


def test_a_list_to_preserve_is_one_attribute(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "target: a shape\npositive: a large shape\nnegative: a small shape\npreserve: [red, blue]\n"
    )
    spec = SliderSpec.load(tmp_path / "s.yaml")
    assert [c.positive for c in spec.contexts()] == ["a red large shape", "a blue large shape"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: a\npositive: b\nnegatve: c\n", "line 3: key 'negatve' is unknown"),
        ("target: a\npositive: b\npositive: c\n", "line 3: key 'positive' stands there twice"),
        ("target: a\npositive: ''\nnegative: c\n", "line 2: .*'positive' is an empty prompt"),
        ("target: a\npositive: b\nnegative: b\n", "both 'b'"),
        ("- target: a\n  positiv: b\n", "line 2: key 'positiv' is unknown"),
        ("- positive: b\n", "line 1: key 'target' is missing"),
        ("- target: 3\n", "line 1: 'target' is 3"),
        ("target: a\npositive: 3\nnegative: c\n", "line 2: 'positive' is 3"),
        ("- a\n", "no set of prompts"),
        ("[]\n", "empty"),
        ("", "must hold"),
        ("target: [\n", "not plain YAML"),
        ("!!python/object/apply:os.system [x]\n", "not plain YAML"),
    ],
)
def test_bad_files_are_told_by_key_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(EditError, match=message):
        SliderSpec.load(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="can't be read"):
        SliderSpec.load(tmp_path / "none.yaml")


def test_published_prompts_load_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "prompts-age.yaml"
    path.write_text(PUBLISHED)
    spec = SliderSpec.load(path)
    first, second = spec.prompts
    assert first == Prompts(
        "male person", "male person, very old", "male person, very young", "male person", "enhance", 4, 512
    )
    assert (second.target, second.negative, second.neutral) == (" female  black person", "", "")
    assert (second.guidance, second.resolution, second.dynamic_resolution) == (3, 512, True)
    assert (spec.name, spec.train) == ("age", {"batch_size": 2})


def test_published_defaults_are_those_of_its_code(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("- target: van gogh\n")
    (only,) = SliderSpec.load(path).prompts
    assert only == Prompts("van gogh", "van gogh", "", "", "erase", 1.0, 512)


def test_a_published_config_brings_prompts_and_settings(tmp_path: Path) -> None:
    folder = tmp_path / "trainscripts" / "textsliders" / "data"
    folder.mkdir(parents=True)
    (folder / "prompts.yaml").write_text(PUBLISHED)
    (folder / "config.yaml").write_text(CONFIG)
    spec = SliderSpec.load(folder / "config.yaml")
    assert spec.name == "age"
    assert len(spec.prompts) == 2
    settings = {key: value for key, value in spec.train.items() if key not in ("steps", "batch_size")}
    chosen = TrainSettings(**settings)
    assert (chosen.rank, chosen.alpha, chosen.targets) == (8, 1.0, ["self-attn", "conv"])
    assert (chosen.learning_rate, chosen.trajectory_steps, chosen.autocast) == (0.0002, 40, "bfloat16")
    assert spec.train["steps"] == 700


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 0.0002", "lrate: 0.0002", "line 15: key 'lrate' of 'train' is unknown"),
        ("other:", "others:", "key 'others' is unknown"),
        ('"AdamW"', '"lion"', "optimizer is 'lion'"),
        ('"noxattn"', '"somewhere"', "training_method is 'somewhere'"),
        ("data/prompts.yaml", "data/nowhere.yaml", "is found neither"),
    ],
)
def test_a_bad_config_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = tmp_path / "trainscripts" / "textsliders" / "data"
    folder.mkdir(parents=True)
    (folder / "prompts.yaml").write_text(PUBLISHED)
    (folder / "config.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises(EditError, match=message):
        SliderSpec.load(folder / "config.yaml")
