"""Live models: several adapters, what is switched on, and whose base it is."""

import copy
import warnings

import peft
import pytest
import torch

from manifolds import LowRank
from peft_analysis import UpdateError, read_update
from peft_analysis.updates.adapters import is_adapter, is_live, read_adapter
from tests.peft_analysis.adapters.adapted import (
    built,
    errors,
    loaded_and_merged,
    merged,
    parameters,
    saved,
    shaken,
    tuned,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::peft.utils.PeftWarning")


def two_adapters(use_dora: bool):
    """A model with two adapters that share some modules, both switched on."""
    base = built("net")
    config = peft.LoraConfig(r=2, target_modules=["line", "image"], use_dora=use_dora)
    model = tuned(base, config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["line", "back"], use_dora=use_dora))
    model.base_model.set_adapter(["default", "other"])
    shaken(model)
    return base, model


@pytest.mark.parametrize("use_dora", [False, True])
def test_several_adapters_add_up(use_dora):
    base, model = two_adapters(use_dora)
    after = merged(model)
    assert errors(read_adapter(base, model), after, base) == {}
    model.merge_adapter()
    assert errors(read_adapter(base, model), after, base) == {}


def test_adapters_of_one_matrix_stay_in_factors():
    base, model = two_adapters(use_dora=False)
    assert {name: value.rank for name, value in read_adapter(base, model).items()} == {
        "line.weight": 5,
        "image.weight": 2,
        "back.weight": 3,
    }


def test_what_is_merged_counts_before_what_is_switched_on():
    base, model = two_adapters(use_dora=False)
    after = parameters(copy.deepcopy(model).merge_and_unload(adapter_names=["other"]))
    # "other" is not in this layer, where "default" goes on working
    after["image.weight"] = merged(model)["image.weight"]
    model.merge_adapter(["other"])
    assert errors(read_adapter(base, model), after, base) == {}


def test_an_adapter_is_read_by_its_name(tmp_path):
    base, model = two_adapters(use_dora=False)
    alone = parameters(copy.deepcopy(model).merge_and_unload(adapter_names=["other"]))
    assert errors(read_adapter(base, model, adapter="other"), alone, base) == {}
    saved(model, tmp_path)
    assert errors(read_adapter(base, tmp_path / "other"), alone, base) == {}
    with pytest.raises(UpdateError, match="no adapter third; the model has default, other"):
        read_adapter(base, model, adapter="third")


def test_kinds_mixed_on_one_matrix():
    base = built("net")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoHaConfig(r=2, target_modules=["line"]), mixed=True
        )
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["line", "back"]))
    model.set_adapter(["default", "other"])
    shaken(model)
    after = merged(model)
    update = read_adapter(base, model)
    assert errors(update, after, base) == {}
    assert update.entries["line.weight"].details["steps"] == ["lora", "loha"]


def test_the_scale_of_a_live_layer_counts():
    base = built("net")
    model = tuned(base, peft.LoraConfig(r=2, target_modules=["line"]))
    before = read_adapter(base, model).dense("line.weight")
    model.base_model.model.line.set_scale("default", 3.0)
    torch.testing.assert_close(read_adapter(base, model).dense("line.weight"), 3 * before)
    model.base_model.model.line.set_scale("default", 0.0)
    assert read_adapter(base, model)["line.weight"].norm() == 0


def test_adapters_put_into_a_model_without_a_peft_model():
    base = built("net")
    bare = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["line"]), copy.deepcopy(base))
    shaken(bare)
    assert is_live(bare)
    assert not is_live(base)
    expected = bare.line.get_delta_weight("default")
    torch.testing.assert_close(read_adapter(base, bare).dense("line.weight"), expected)


def test_the_very_model_that_peft_put_its_layers_into_is_a_base(tmp_path):
    base = built("net")
    inside = copy.deepcopy(base)
    model = peft.get_peft_model(inside, peft.LoraConfig(r=2, target_modules=["line"]))
    shaken(model)
    after = merged(model)
    assert errors(read_adapter(inside, model), after, base) == {}
    assert errors(read_adapter(inside, saved(model, tmp_path)), after, base) == {}
    assert is_adapter(tmp_path)


def test_a_start_taken_off_the_base_counts_where_the_base_is_given():
    base = built("llama")
    model = tuned(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    update = read_adapter(base, model)
    assert errors(update, merged(model), base) == {}
    assert {entry.rounded for entry in update.entries.values()} == {torch.float32}
    alone = read_adapter(None, model)
    assert all(isinstance(value, LowRank) and value.rank == 4 for value in alone.values())
    assert "pissa" in alone.source


def test_pissa_saved_as_a_lora_of_twice_the_rank(tmp_path):
    base = built("llama")
    model = tuned(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    start = tmp_path / "start"
    model.peft_config["default"].init_lora_weights = True
    saved(tuned(base, model.peft_config["default"]), start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        )
        fresh.peft_config["default"].init_lora_weights = True
        fresh.save_pretrained(start)
        fresh.peft_config["default"].init_lora_weights = "pissa"
        shaken(fresh)
        after = merged(fresh)
        fresh.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(start))
    update = read_adapter(base, tmp_path / "lora")
    assert errors(update, after, base) == {}
    assert errors(update, loaded_and_merged(base, tmp_path / "lora"), base) == {}
    assert {value.rank for value in update.values()} == {8}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_folder_is_a_base(name, tmp_path):
    base = built(name)
    base.save_pretrained(tmp_path / "base")
    target = {"gpt2": ["c_attn", "wte"], "llama": ["q_proj"]}[name]
    config = peft.LoraConfig(r=2, target_modules=target, use_dora=True)
    folder = saved(tuned(base, config), tmp_path / "adapter")
    after = loaded_and_merged(base, folder)
    update = read_update(tmp_path / "base", folder)
    assert errors(update, after, base) == {}
    assert read_adapter(tmp_path / "base", folder).keys() == update.keys()
    with update.apply(base):
        torch.testing.assert_close(parameters(base), dict(after), rtol=1e-6, atol=1e-6)


def test_a_lora_alone_has_names_shapes_and_factors(tmp_path):
    base = built("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    folder = saved(tuned(base, config), tmp_path)
    alone, whole = read_adapter(None, folder), read_adapter(base, folder)
    assert alone.keys() == whole.keys()
    for name in alone:
        assert alone.entries[name].shape == whole.entries[name].shape
        assert alone.entries[name].layout == whole.entries[name].layout
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(alone.matrix(name).dense(), whole.matrix(name).dense())
    assert alone.entries["transformer.ln_f.weight"].details["needs_base"]
    with pytest.raises(UpdateError, match=r"transformer.ln_f.weight: the base's weights are needed"):
        alone["transformer.ln_f.weight"]


def test_device_and_dtype_follow_the_base(device, tmp_path):
    base = built("net").to(device, torch.bfloat16)
    model = tuned(base, peft.LoraConfig(r=2, target_modules=["line", "image"]))
    folder = saved(model, tmp_path)
    dora = tuned(base, peft.LoraConfig(r=2, target_modules=["line"], use_dora=True))
    for update in (read_adapter(base, folder), read_adapter(base, model), read_adapter(base, dora)):
        assert update["line.weight"].device.type == device.type
        assert update["line.weight"].dtype == torch.float32
    expected = model.base_model.model.line.get_delta_weight("default")
    torch.testing.assert_close(read_adapter(base, folder).dense("line.weight"), expected.float())
    entry = read_adapter(base, dora).entries["line.weight"]
    assert (entry.rounded, entry.base_rounded) == (None, torch.bfloat16)


def test_facts_are_known_before_values(tmp_path):
    base = built("net")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["line"], use_dora=True, use_rslora=True)
    model = tuned(base, config)
    entry = read_adapter(base, saved(model, tmp_path)).entries["line.weight"]
    assert entry.kind == "dora"
    assert entry.details == {"rank": 4, "alpha": 6.0, "scaling": 3.0}
    magnitude = model.base_model.model.line.lora_magnitude_vector["default"].weight
    assert torch.equal(entry.magnitude(), magnitude)


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_half_precision_factors_multiply_in_float32(bits, tmp_path):
    base = built("net")
    model = tuned(base, peft.LoraConfig(r=3, target_modules=["line"]))
    layer = model.base_model.model.line
    layer.lora_A.to(bits), layer.lora_B.to(bits)
    a, b = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    found = read_adapter(base, saved(model, tmp_path)).dense("line.weight").double()
    torch.testing.assert_close(found, b @ a * 8 / 3, rtol=1e-6, atol=1e-6)
