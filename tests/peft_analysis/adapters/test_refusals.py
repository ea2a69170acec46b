"""Adapters that cannot be read: the message names what is wrong, where, and what to do."""

import copy
import json
import pickle
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_analysis import UpdateError, Weights
from peft_analysis.updates.adapters import read_adapter
from tests.peft_analysis.adapters.adapted import built, saved, tuned
from tests.peft_analysis.adapters.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::peft.utils.PeftWarning")
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def lora(tmp_path):
    """The folder of a LoRA on "line" and "back" of the net."""
    return saved(tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line", "back"])), tmp_path)


def settings(folder, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def tensors(folder, change):
    held = load_file(folder / TENSORS)
    change(held)
    save_file(held, folder / TENSORS)


def refused(base, folder, *words):
    with pytest.raises(UpdateError) as error:
        read_adapter(base, folder)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"


def test_an_adapter_for_another_base_lists_names_and_shapes(lora):
    refused(built("llama"), lora, "line.weight is not in", "back.weight is not in", "LlamaForCausalLM")
    wider = built("net")
    wider.line = nn.Linear(9, 12)
    refused(wider, lora, r"line.weight has shape \(12, 9\)", r"\(12, 8\)")


@pytest.mark.parametrize(
    "case", ["dora", "adalora", "vera", "loha", "lokr", "ia3", "oft", "boft", "randlora"]
)
def test_every_kind_lists_the_modules_that_another_base_lacks(case, tmp_path):
    base = built("net")
    folder = saved(tuned(base, CASES[case].config()), tmp_path)
    del base.line
    refused(Weights.of_module(base), folder, r"\bline\b")


@pytest.mark.parametrize("case", ["dora", "adalora", "loha", "lokr", "ia3", "layer norms"])
def test_every_kind_lists_what_is_of_another_shape(case, tmp_path):
    base = built("net")
    folder = saved(tuned(base, CASES[case].config()), tmp_path)
    base.line, base.norm = nn.Linear(9, 13), nn.LayerNorm(9)
    refused(base, folder, r"(line|norm).weight has shape \((13, )?9,?\)")


def test_shapes_that_only_peft_knows_are_refused_when_read(tmp_path):
    base = built("net")
    folder = saved(tuned(base, CASES["oft"].config()), tmp_path)
    base.line = nn.Linear(16, 12)
    with pytest.raises(UpdateError, match=r"OFT adapter that does not fit: of another shape: line.oft_R"):
        read_adapter(base, folder)["line.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_listed(lora, value):
    tensors(lora, lambda held: held["base_model.model.line.lora_A.weight"].fill_(value))
    refused(built("net"), lora, "NaN or infinite values in .*line.lora_A.weight")


def test_a_file_that_is_cut_short(lora):
    whole = (lora / TENSORS).read_bytes()
    (lora / TENSORS).write_bytes(whole[: len(whole) // 2])
    refused(built("net"), lora, TENSORS)
    (lora / TENSORS).unlink()
    refused(built("net"), lora, "neither adapter_model.safetensors nor adapter_model.bin")


@pytest.mark.parametrize("factor", ["lora_A.weight", "lora_B.weight"])
def test_a_factor_that_is_missing(factor, lora):
    tensors(lora, lambda held: held.pop(f"base_model.model.line.{factor}"))
    refused(built("net"), lora, f"line: {factor} is missing")


def test_a_tensor_that_nothing_explains(lora):
    tensors(lora, lambda held: held.update({"base_model.model.line.other": torch.ones(2)}))
    refused(built("net"), lora, "line.other is not in Net")


def test_rank_zero(lora):
    def emptied(held):
        held["base_model.model.line.lora_A.weight"] = torch.zeros(0, 8)
        held["base_model.model.line.lora_B.weight"] = torch.zeros(12, 0)

    tensors(lora, emptied)
    refused(built("net"), lora, r"line: factors of shapes \(0, 8\) and \(12, 0\): rank 0")
    settings(lora, r=0)
    refused(None, lora, "rank")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"lora_alpha": 0}, "line: alpha is 0"),
        ({"alpha_pattern": {"line": 0}}, "line: alpha is 0"),
        ({"lora_alpha": None}, "alpha is None"),
        ({"lora_alpha": float("inf")}, "alpha is inf"),
        ({"r": 5}, "the factors have rank 2, adapter_config.json says 5"),
        ({"rank_pattern": {"back": 3}}, "back: the factors have rank 2, adapter_config.json says 3"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"peft_type": None}, "names no peft_type"),
        ({"peft_type": "NEWEST"}, "NEWEST is no kind that the installed peft knows"),
        ({"use_dora": True}, "line: lora_magnitude_vector is missing"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication .* copies"),
        ({"alora_invocation_tokens": [1, 2]}, "invocation tokens"),
        ({"init_lora_weights": "loftq"}, "LoftQ took values off the base"),
        ({"init_lora_weights": "corda"}, "CorDA .* path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
    ],
)
def test_settings_that_cannot_be(lora, changed, word):
    settings(lora, **changed)
    refused(built("net"), lora, word)


@pytest.mark.parametrize(
    "kind",
    [
        "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE",
        "ADAPTION_PROMPT", "XLORA", "POLY", "LILY", "SHADOW",
    ],
)  # fmt: skip
def test_kinds_that_change_no_weights_are_refused_by_name(lora, kind):
    settings(lora, peft_type=kind)
    refused(built("net"), lora, f"{kind} is no change of weights: it ")
    assert kind in peft.PeftType.__members__


def test_every_kind_that_peft_knows_is_read_or_refused():
    from peft_analysis.updates.adapters.kinds import FAMILIES, NO_WEIGHTS, WHOLE

    tried = {case.config().peft_type.value for case in CASES.values()}
    assert set(FAMILIES) | set(WHOLE) <= tried | {"DORA"}
    assert set(peft.PeftType.__members__) - set(NO_WEIGHTS) - tried == {"BONE"} & set(
        peft.PeftType.__members__
    )


def test_a_config_that_is_no_json(lora):
    (lora / "adapter_config.json").write_text("{")
    refused(built("net"), lora, "adapter_config.json")


def test_a_folder_of_several_adapters_names_them(tmp_path):
    model = tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line"]), adapter="first")
    refused(built("net"), saved(model, tmp_path), "has no adapter_config.json; it holds the adapters first")
    refused(built("net"), tmp_path / "nowhere", "has no adapter_config.json")


def test_what_needs_the_base_asks_for_it(tmp_path):
    for case in ("dora", "ia3", "oft", "vera", "pissa", "layer norms"):
        base = built(CASES[case].model)
        folder = saved(tuned(base, CASES[case].config()), tmp_path / case)
        refused(None, folder, "base")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_read_only_without_code(lora, tmp_path):
    base = built("net")
    expected = read_adapter(base, lora).dense("line.weight")
    held = load_file(lora / TENSORS)
    (lora / TENSORS).unlink()
    torch.save(held, lora / "adapter_model.bin")
    assert torch.equal(read_adapter(base, lora).dense("line.weight"), expected)
    (lora / "adapter_model.bin").write_bytes(pickle.dumps({"a": Code()}))
    refused(base, lora, "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


class Code:
    """Would run a command if it were unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


def test_a_quantised_base(lora):
    base = built("net")
    base.line.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.int8), requires_grad=False)
    refused(base, lora, "quantised: the numbers of line.weight are codes")


def test_a_live_model_whose_base_is_quantised_is_read_beside_the_base_as_it_was():
    base = built("net")
    model = tuned(base, peft.LoraConfig(r=2, target_modules=["line"]))
    expected = read_adapter(base, model).dense("line.weight")
    layer = model.base_model.model.line.base_layer
    layer.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UpdateError, match="quantised"):
        read_adapter(None, model)
    assert torch.equal(read_adapter(base, model).dense("line.weight"), expected)


def test_a_live_model_upon_another_base():
    model = tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line"]))
    other = built("net")
    del other.back
    other.norm = nn.LayerNorm(9)
    refused(other, model, r"it lacks: back.bias, back.weight", r"of another shape: norm.bias, norm.weight")
    refused(built("net"), built("net"), "Net has no adapters in it")


def test_biases_trained_in_place_need_the_base():
    model = tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line"], bias="all"))
    refused(None, model, "biases were trained in place")


def test_vocabularies_that_differ(tmp_path):
    base = built("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    folder = saved(tuned(base, config), tmp_path)
    smaller = copy.deepcopy(base)
    smaller.resize_token_embeddings(40)
    refused(smaller, folder, r"embed_tokens.weight has shape \(40, 16\).*\(50, 16\)", "vocabularies differ")


def test_a_token_that_the_table_lacks(tmp_path):
    folder = saved(tuned(built("gpt2"), CASES["trainable tokens"].config()), tmp_path)
    settings(folder, token_indices=[3, 70])
    refused(built("gpt2"), folder, "rows 3 to 70")
    settings(folder, token_indices=[3])
    refused(built("gpt2"), folder, r"rows of shape \(2, 16\) for 1 tokens")


def test_a_lora_on_a_grouped_convolution(tmp_path):
    base = built("net")
    base.image = nn.Conv2d(4, 8, 3, groups=2)
    folder = saved(tuned(base, peft.LoraConfig(r=2, target_modules=["image"])), tmp_path)
    refused(base, folder, "image: a LoRA on a grouped convolution")


def test_a_direction_that_is_not_defined(tmp_path):
    base = built("net")
    base.line.weight.data[3] = 0.0
    model = tuned(base, peft.LoraConfig(r=2, target_modules=["line"], use_dora=True))
    model.base_model.model.line.lora_B["default"].weight.data[3] = 0.0
    update = read_adapter(base, saved(model, tmp_path))
    with pytest.raises(UpdateError, match="row of zeros"):
        update["line.weight"]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
def test_a_live_model_is_refused_as_its_folder_is():
    model = tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line"]))
    model.base_model.model.line.lora_A["default"].weight.data[0, 0] = float("nan")
    refused(None, model, "line: NaN or infinite values in lora_A.weight")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(None, peft.get_peft_model(built("llama"), config), "PROMPT_TUNING is no change of weights")


def test_weights_that_are_elsewhere(lora):
    model = tuned(built("net"), peft.LoraConfig(r=2, target_modules=["line"], use_dora=True))
    elsewhere = built("net")
    elsewhere.line.to("meta")
    with pytest.raises(UpdateError, match=r"line.weight has no values \(meta device\)"):
        read_adapter(elsewhere, saved(model, lora))["line.weight"]
