"""Two checkpoints against plain subtraction, and what does not match told by name."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates import pairs
from peft_analysis.updates.read import read_update
from peft_analysis.updates.weights import Weights
from tests.conftest import build_gpt2, build_llama


def tuned_copy(model, seed=1, size=0.1):
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in tuned.parameters():
            value += size * torch.randn(value.shape, generator=generator).to(value)
    return tuned


def pair(device="cpu", base_dtype=torch.float32, tuned_dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 3, 2), nn.LayerNorm(3)).to(device)
    return base.to(base_dtype), tuned_copy(base).to(tuned_dtype)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
def test_differences_are_taken_in_float32_or_wider(base_dtype, tuned_dtype, device):
    base, tuned = pair(device, base_dtype, tuned_dtype)
    update = read_update(base, tuned)
    wide = torch.float64 if torch.float64 in (base_dtype, tuned_dtype) else torch.float32
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        found = update[name]
        assert found.dtype == wide and found.device.type == device.type
        torch.testing.assert_close(found.double(), after.double() - before.double(), rtol=1e-6, atol=1e-7)
        entry = update.entries[name]
        assert (entry.base_rounded, entry.rounded, entry.kind) == (base_dtype, tuned_dtype, "difference")


@pytest.mark.parametrize("build", [build_gpt2, build_llama])
def test_folders_of_other_shards_and_dtypes(build, tmp_path):
    base = build(40)
    tuned = tuned_copy(base).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    update = read_update(tmp_path / "base", str(tmp_path / "tuned"))
    assert list(update) == list(Weights.of(tmp_path / "base"))
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(update[name], after.float() - before)
    conv1d = [name for name in update if update.entries[name].layout == "in_out"]
    assert bool(conv1d) is (build is build_gpt2)
    for name in conv1d:
        assert torch.equal(update.matrix(name), update[name].mT)
        assert torch.equal(update.base_matrix(name), base.get_parameter(name).mT)


def test_matrices_of_a_pair():
    base, tuned = pair()
    update = read_update(base, tuned)
    assert update.matrices() == ["0.weight", "1.weight"]
    assert update.matrix("1.weight").shape == update.base_matrix("1.weight").shape == (3, 8)
    with pytest.raises(UpdateError, match="not a matrix"):
        update.matrix("0.bias")


@pytest.mark.parametrize("headed", ["base", "tuned"])
def test_a_prefix_more_or_less(headed):
    bare = {f"layers.{n}.weight": torch.randn(3, 2) for n in range(4)}
    full = {f"model.{name}": value + 1 for name, value in bare.items()}
    base, tuned = (full, bare) if headed == "base" else (bare, full)
    update = read_update(base, tuned)
    assert list(update) == list(base)
    for number, name in enumerate(update):
        torch.testing.assert_close(update[name], list(tuned.values())[number] - base[name])


def test_a_file_without_a_config_is_named_as_the_folder_beside_it(tmp_path):
    base = build_gpt2(40)
    base.save_pretrained(tmp_path / "base")
    tuned = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("transformer."): value + 1 for name, value in tuned.items()}
    bare["lm_head.weight"] = bare["wte.weight"].clone()  # as a state dict that was saved whole
    (tmp_path / "alone").mkdir()
    torch.save(bare, tmp_path / "alone" / "tuned.bin")
    for ours, theirs in ((tmp_path / "base", "tuned"), (base, "tuned")):
        update = read_update(ours, tmp_path / "alone" / f"{theirs}.bin")
        assert "lm_head.weight" not in update and update.entries["transformer.wte.weight"].shape == (40, 32)
        torch.testing.assert_close(update["transformer.h.0.attn.c_attn.weight"], torch.ones(32, 96))
    back = read_update(tmp_path / "alone" / "tuned.bin", tmp_path / "base")
    assert back.entries["transformer.h.0.attn.c_attn.weight"].layout == "in_out"


def test_what_only_one_has_is_listed():
    base = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2, 2)}
    with pytest.raises(UpdateError, match=r"only tensors in memory has b.*\(tuned\) has d") as error:
        read_update(base, {"a": torch.ones(2), "d": torch.ones(2), "c": torch.ones(2, 2)})
    assert "without=" in str(error.value)
    with pytest.raises(UpdateError, match=r"c has shape \(2, 3\), in the base \(2, 2\)"):
        read_update(base, {**base, "c": torch.ones(2, 3)})
    with pytest.raises(UpdateError, match="only"):
        read_update(base, {"x": torch.ones(1)})
    with pytest.raises(UpdateError, match="beside the base"):
        read_update(None, base)
    with pytest.raises(UpdateError, match="tuned is None"):
        read_update(base, None)


def test_only_and_without():
    base, tuned = pair()
    assert list(read_update(base, tuned, only=r"weight$", without="2")) == ["0.weight", "1.weight"]
    assert list(read_update(base, tuned, only=["1.bias", "0.weight"])) == ["0.weight", "1.bias"]
    assert len(read_update(base, tuned, without=["1.bias"])) == 5
    partial = {name: value for name, value in tuned.state_dict().items() if name != "2.bias"}
    assert len(read_update(base, partial, without=r"2\.")) == 4
    for selection in ("nowhere", ["0.wieght"], "("):
        with pytest.raises(UpdateError, match="only="):
            read_update(base, tuned, only=selection)


@pytest.mark.parametrize("more", [3, -3])
@pytest.mark.parametrize("known", [True, False])
def test_resized_embeddings_are_compared_in_the_rows_in_common(more, known):
    base = build_gpt2(40)
    tuned = tuned_copy(base)
    tuned.resize_token_embeddings(40 + more)
    before, after = (base, tuned) if known else (base.state_dict(), tuned.state_dict())
    update = read_update(before, after)
    entry = update.entries["transformer.wte.weight"]
    rows = min(40, 40 + more)
    assert entry.shape == (40, 32) and entry.details["rows"] == rows
    assert (entry.details["new_rows"], entry.details["lost_rows"]) == (max(more, 0), max(-more, 0))
    assert str(rows) in entry.details["reason"]
    kept = tuned.transformer.wte.weight.clone()
    value = update["transformer.wte.weight"]
    wanted = tuned.transformer.wte.weight[:rows] - base.transformer.wte.weight[:rows]
    assert torch.equal(tuned.transformer.wte.weight, kept), "reading must not write"
    assert torch.equal(value[:rows], wanted) and bool((value[rows:] == 0).all())


def test_other_layers_of_another_size_are_no_embeddings():
    base = {"embed.weight": torch.ones(5, 2), "up.weight": torch.ones(5, 2)}
    tuned = {"embed.weight": torch.ones(6, 2), "up.weight": torch.ones(6, 2)}
    with pytest.raises(UpdateError, match=r"in 1 parameters: up\.weight has shape"):
        read_update(base, tuned)


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_embeddings_of_other_tokens_are_not_compared(kind, tmp_path):
    models = {"base": build_gpt2(40), "tuned": build_gpt2(44)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)

    def write(name, tokens):
        found = dict(zip(tokens, range(len(tokens)), strict=True))
        vocabulary = found if kind == "dict" else [[token, 0.0] for token in tokens]
        added = [{"id": len(tokens), "content": "<new>"}]
        text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})
        (tmp_path / name / "tokenizer.json").write_text(text)

    tokens = [f"t{n}" for n in range(40)]
    write("base", tokens[:-1])
    write("tuned", [*tokens[:-1], "<new>", "x", "y"])
    read_update(tmp_path / "base", tmp_path / "tuned")
    write("tuned", [*tokens[::-1], "x", "y"])
    with pytest.raises(UpdateError, match=r"other vocabularies: 40 of 40 tokens .*the first is 0: 't39'"):
        read_update(tmp_path / "base", tmp_path / "tuned")
    assert len(read_update(tmp_path / "base", tmp_path / "tuned", without="wte")) == 39


def test_tied_in_one_and_apart_in_the_other():
    base = build_gpt2(40)
    apart = tuned_copy(base).state_dict()
    apart = {name: value.clone() for name, value in apart.items()}
    apart["lm_head.weight"] += 1
    update = read_update(base, apart)
    shift = update["lm_head.weight"] - update["transformer.wte.weight"]
    torch.testing.assert_close(shift, torch.ones(40, 32))
    back = read_update(apart, base)
    torch.testing.assert_close(back["lm_head.weight"], -update["lm_head.weight"])


def test_buffers(tmp_path):
    base = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    tuned = copy.deepcopy(base)
    tuned(torch.randn(4, 2, 5, 5))
    update = read_update(base, tuned)
    assert torch.equal(update["1.running_mean"], tuned[1].running_mean)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    for before in (base, base.state_dict()):
        update = read_update(before, tmp_path / "tuned.safetensors")
        assert "1.num_batches_tracked" not in update and "1.num_batches_tracked" in update.skipped


def test_codes_and_masks():
    base = {"w": torch.ones(2, 2), "ids": torch.arange(5), "mask": torch.full((3, 3), -torch.inf).triu(1)}
    update = read_update(base, {**base, "w": torch.zeros(2, 2)})
    assert "the same in both" in update.skipped["ids"]
    assert bool((update["mask"] == 0).all())
    for other in (torch.arange(5) + 1, torch.arange(5).to(torch.uint8)):
        with pytest.raises(UpdateError, match=r"ids is stored as .*dequantise"):
            read_update(base, {**base, "ids": other})
    codes = {"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(UpdateError, match="float8"):
        read_update({"w": torch.ones(2, 2)}, codes)
    with pytest.raises(UpdateError, match="complex"):
        read_update({"w": torch.ones(2, dtype=torch.complex64)}, {"w": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_damaged_weights_are_named(value, side):
    base, tuned = pair()
    with torch.no_grad():
        (base if side == "base" else tuned)[1].weight[0, 0] = value
    update = read_update(base, tuned)
    update["0.weight"]
    with pytest.raises(UpdateError, match=rf"1\.weight: 4 values of the {side} weights are NaN or infinite"):
        update["1.weight"]


def test_large_values_are_not_mistaken_for_infinite_ones():
    base, tuned = {"w": torch.full((4,), -1e38)}, {"w": torch.full((4,), 2e38)}
    torch.testing.assert_close(read_update(base, tuned)["w"], torch.full((4,), 3e38))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (1, 5), (5, 1)])
def test_small_parameters(shape):
    base = {"w": torch.randn(shape), "other": torch.ones(2)}
    update = read_update(base, {"w": base["w"] + 1, "other": torch.ones(2)})
    assert update["w"].shape == shape and update.entries["w"].shape == shape
    torch.testing.assert_close(update["w"], torch.ones(shape))
    assert list(update.changed()) == (["w"] if torch.Size(shape).numel() else [])


def test_the_same_checkpoint_twice_changes_nothing():
    base, _ = pair()
    update = read_update(base, copy.deepcopy(base))
    assert len(update) == 6 and all(bool((value == 0).all()) for value in update.values())
    assert len(update.changed()) == 0


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "memory"])
@pytest.mark.parametrize("rows", [9, 12, 5])
def test_differences_taken_block_by_block(block, suffix, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", block)
    base = {"embed.weight": torch.randn(9, 3), "norm": torch.randn(4)}
    tuned = {"embed.weight": torch.randn(rows, 3).bfloat16(), "norm": torch.randn(4)}
    sources = []
    for name, tensors in (("base", base), ("tuned", tuned)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "safetensors":
            save_file(tensors, path)
        elif suffix == "bin":
            torch.save(tensors, path)
        sources.append(tensors if suffix == "memory" else path)
    update = read_update(*sources)
    both = min(rows, 9)
    wanted = torch.zeros(9, 3)
    wanted[:both] = tuned["embed.weight"][:both].float() - base["embed.weight"][:both]
    assert torch.equal(update["embed.weight"], wanted)
    assert torch.equal(update["norm"], tuned["norm"] - base["norm"])
