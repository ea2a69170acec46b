"""Folders and files against what transformers itself loads from them."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.files import open_file
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights
from tests.conftest import build_gpt2, build_llama

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "Llama": {}, "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 11}, "Gemma2": {"head_dim": 8},
}  # fmt: skip


def build(name, **more):
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **more, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    head = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, head)(config)


def assert_same(weights, model):
    live = dict(model.named_parameters())
    assert set(weights) == set(live)
    for name, value in live.items():
        assert weights.shape(name) == value.shape and weights.dtype(name) == value.dtype
        assert torch.equal(weights[name], value)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_the_models_own_names_and_values(name, tmp_path):
    model = build(name, **MODELS[name])
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    weights = Weights.of(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(weights, model)
    live = Weights.of(model)
    assert {n: weights.layout(n) for n in weights} == {n: live.layout(n) for n in live}
    assert weights.tied == live.tied and weights.embeddings == live.embeddings


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bert"])
def test_a_checkpoint_without_the_heads_prefix_and_with_old_names(name, tmp_path):
    model = build(name, **MODELS.get(name, {}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        key.removeprefix(f"{model.base_model_prefix}.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(path).items()
    }
    save_file(old, path)
    assert_same(Weights.of(tmp_path), model)


def test_layouts_come_from_the_modules(tmp_path):
    gpt2 = Weights.of(build_gpt2(40))
    assert gpt2.layout("transformer.h.0.attn.c_attn.weight") == "in_out"
    assert gpt2.layout("transformer.wte.weight") == gpt2.layout("transformer.ln_f.bias") == "other"
    assert Weights.of(build_llama(40)).layout("model.layers.0.mlp.up_proj.weight") == "out_in"
    nets = nn.ModuleDict({"plain": nn.Conv2d(3, 5, 3), "turned": nn.ConvTranspose2d(3, 5, 3)})
    layouts = Weights.of(nets)
    assert [layouts.layout(f"{name}.weight") for name in nets] == ["out_in", "in_out"]


def test_a_tied_parameter_is_listed_once_and_known_by_both_names(tmp_path):
    model = build_gpt2(40)
    model.save_pretrained(tmp_path)
    for weights in (Weights.of(model), Weights.of(tmp_path)):
        assert "lm_head.weight" in weights and "lm_head.weight" not in list(weights)
        assert torch.equal(weights["lm_head.weight"], model.transformer.wte.weight)
        assert weights.shape("lm_head.weight") == (40, 32) and weights.layout("lm_head.weight") == "other"


@pytest.mark.parametrize("same", [True, False])
def test_both_names_of_a_tied_parameter_in_one_file(same, tmp_path):
    model = build_gpt2(40)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.wte.weight"].clone()
    tensors["lm_head.weight"] = head if same else head + 1
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights.of(tmp_path)
    assert ("lm_head.weight" in list(weights)) is not same
    assert torch.equal(weights["lm_head.weight"], tensors["lm_head.weight"])


def test_buffers_that_count_or_mask_are_no_weights(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    net.register_buffer("made", torch.ones(2), persistent=False)
    weights = Weights.of(net)
    assert "1.running_mean" in weights and "made" not in weights
    assert "counts" in weights.why_skipped("1.num_batches_tracked")
    assert "does not save" in weights.why_skipped("made")
    assert weights.why_skipped("0.weight") is None


def test_a_model_that_transformers_does_not_know_is_read_by_its_file(tmp_path, caplog):
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody-knows", "architectures": ["X"]}))
    with caplog.at_level(logging.WARNING):
        weights = Weights.of(tmp_path)
    assert list(weights) == ["a.weight"] and weights.layout("a.weight") == "out_in"
    assert "does not know this model" in caplog.text


def test_a_pipelines_folder_gives_all_its_parts(tmp_path):
    for part, model in (("unet", nn.Linear(2, 3)), ("text_encoder", nn.Linear(4, 5))):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        save_file(dict(model.state_dict()), tmp_path / part / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "unet": 1, "text_encoder": 1}))
    weights = Weights.of(tmp_path)
    assert sorted(weights) == ["text_encoder.bias", "text_encoder.weight", "unet.bias", "unet.weight"]
    assert weights.shape("unet.weight") == (3, 2)


@pytest.mark.parametrize("ending", ["bin", "pt"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_files_of_plain_tensors(ending, old, nested, tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.randn(2, dtype=torch.float64)}
    path = tmp_path / f"w.{ending}"
    torch.save({"state_dict": state} if nested else state, path, _use_new_zipfile_serialization=not old)
    weights = Weights.of(path)
    assert list(weights) == ["a", "b"] and weights.dtype("b") == torch.float64
    assert all(torch.equal(weights[name], state[name]) for name in state)


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [Payload(), nn.Linear(2, 2)])
def test_a_pickle_that_could_run_code_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UpdateError, match="unpickling can run code"):
        Weights.of(tmp_path / "w.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("left", [0, 5, 200, -8])
def test_a_file_that_is_cut_off_is_refused(suffix, left, tmp_path):
    path = tmp_path / f"w.{suffix}"
    state = {"a": torch.ones(100, 4)}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[:left])
    with pytest.raises(UpdateError, match=r"w\."):
        Weights.of(path)["a"]


def test_what_lacks_or_is_unclear_is_named(tmp_path):
    model = build("Llama")
    model.save_pretrained(tmp_path / "m", max_shard_size="6KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UpdateError, match=f"lacks 1 of .*{shard.name}"):
        Weights.of(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    with pytest.raises(UpdateError, match=r"lacks shards \[2\]"):
        Weights.of(tmp_path / "m")
    shard.write_bytes(content)
    assert_same(Weights.of(tmp_path / "m"), model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpdateError, match="holds no weights"):
        Weights.of(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UpdateError, match="holds an adapter"):
        Weights.of(tmp_path / "empty")
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(UpdateError, match=r"x\.safetensors, y\.safetensors"):
        Weights.of(tmp_path / "empty")
    with pytest.raises(UpdateError, match="no folder or file"):
        Weights.of(tmp_path / "nowhere")
    with pytest.raises(UpdateError, match="from a int"):
        Weights.of(3)
    with pytest.raises(UpdateError, match="meta device"):
        Weights.of(nn.Linear(2, 2, device="meta"))["weight"]


def test_an_index_that_names_what_its_shards_lack(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    index = {"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UpdateError, match="its shards lack: b"):
        Weights.of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UpdateError, match="cannot be read as JSON"):
        Weights.of(tmp_path)


def test_a_tensor_is_let_go_with_its_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(3)}, path)
    file = open_file(path)
    value = file.tensors["a"].read()
    shutil.copy(path, tmp_path / "copy.safetensors")
    path.unlink()
    assert torch.equal(value, torch.ones(3))
    with pytest.raises(UpdateError, match="cannot be read"):
        file.tensors["a"].read()


def test_weights_plus_an_update(device):
    net = nn.Linear(3, 2, device=device, dtype=torch.bfloat16)
    added = WeightUpdate.from_tensors({"weight": torch.ones(2, 3, device=device)})
    sums = Weights.of(net).plus(added)
    assert sums.dtype("weight") == torch.float32 and sums.dtype("bias") == torch.bfloat16
    assert torch.equal(sums["weight"], net.weight.float() + 1) and torch.equal(sums["bias"], net.bias)
    with pytest.raises(UpdateError, match="has no other"):
        Weights.of(net).plus(WeightUpdate.from_tensors({"other": torch.ones(1)}))
