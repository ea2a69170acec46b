"""An update applied, undone, scaled and saved: against plain arithmetic on the parameters, to the bit."""

import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.read import read_update
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights
from tests.conftest import build_gpt2


def normal(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


def net(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(4, 6), "conv": nn.Conv2d(2, 3, 2)}).to(device, dtype)


def update_of(device="cpu", **facts):
    values = {
        "fc.weight": LowRank.from_factors(normal(6, 2, device=device), normal(2, 4, seed=1, device=device)),
        "conv.weight": LowRank.from_factors(normal(3, 1, seed=2, device=device), normal(1, 8, device=device)),
        "fc.bias": normal(6, seed=3, device=device),
    }
    return WeightUpdate.from_tensors(values, base=Weights.of(net(device)), **facts)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_apply_adds_in_float32_and_rounds_once(dtype, scale, device):
    model, update = net(device, dtype), update_of(device)
    before = state(model)
    applied = update.apply(model, scale)
    assert applied.names == list(update)
    for name, value in model.state_dict().items():
        if name not in update:
            assert torch.equal(value, before[name])
            continue
        dense = update[name].dense() if isinstance(update[name], LowRank) else update[name]
        exact = before[name].double() + scale * dense.reshape(value.shape).double()
        wanted = exact.float().to(dtype) if dtype.itemsize < 4 else exact.to(dtype)
        torch.testing.assert_close(value, wanted, rtol=2e-6 if dtype.itemsize > 2 else 0.01, atol=1e-6)
        assert value.dtype == dtype and value.device.type == device.type
    applied.remove()
    applied.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pair_applied_to_its_base_gives_the_tuned_model_to_the_bit():
    base = build_gpt2(40).to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for value in tuned.parameters():
            value += 0.05 * torch.randn_like(value)
    before = state(base)
    with read_update(copy.deepcopy(base), tuned).apply(base):
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_failure_midway_leaves_the_model_as_it_was(where):
    model, update = net(), update_of()
    before, seen = state(model), []

    def read(name, value):
        seen.append(name)
        if len(seen) == where + 1:
            raise BrokenError(name)
        return value

    with pytest.raises(BrokenError):
        update.map(read).apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(seen) == where + 1


@pytest.mark.parametrize(
    ("dtype", "value", "scale"),
    [(torch.float32, float("nan"), 1.0), (torch.float16, 7e4, 1.0), (torch.float32, 1e38, 1e3)],
)
def test_sums_that_no_number_holds_are_refused(dtype, value, scale):
    model = net(dtype=dtype)
    before = state(model)
    bias = torch.zeros(6)
    bias[2] = value
    update = WeightUpdate.from_tensors({"conv.bias": torch.ones(3), "fc.bias": bias})
    with pytest.raises(UpdateError, match=r"fc\.bias would hold NaN or infinite"):
        update.apply(model, scale)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mask_keeps_its_infinities():
    model = nn.Module()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    WeightUpdate.from_tensors({"mask": torch.tensor([1.0, 0.0])}).apply(model)
    assert model.mask.tolist() == [1.0, -float("inf")]


def test_what_does_not_fit_is_listed_before_anything_changes():
    model = net()
    before = state(model)
    wrong = {"fc.weight": torch.ones(6, 4), "fc.bias": torch.ones(5), "gone.weight": torch.ones(1)}
    with pytest.raises(UpdateError, match=r"no gone\.weight; fc\.bias has shape \(6,\), the update \(5,\)"):
        WeightUpdate.from_tensors(wrong).apply(model)
    model.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UpdateError, match=r"codes is stored as torch.uint8"):
        WeightUpdate.from_tensors({"codes": torch.ones(2, 2)}).apply(model)
    with pytest.raises(UpdateError, match="meta device"):
        update_of().apply(net().to("meta"))
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises((UpdateError, TypeError)):
            update_of().apply(model, scale)
    assert all(torch.equal(value, before[name]) for name, value in state(net()).items())


@pytest.mark.parametrize("shared", ["parameter", "memory"])
def test_a_tied_parameter_changes_once(shared):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    if shared == "parameter":
        model["b"].weight = model["a"].weight
    else:
        model["b"].weight.data = model["a"].weight.data
    before = model["a"].weight.clone()
    one = torch.ones(3, 3)
    with WeightUpdate.from_tensors({"a.weight": one, "b.weight": one}).apply(model):
        torch.testing.assert_close(model["b"].weight, before + 1)
    assert torch.equal(model["b"].weight, before)
    with pytest.raises(UpdateError, match="tied"):
        WeightUpdate.from_tensors({"a.weight": one, "b.weight": 2 * one}).apply(model)
    assert torch.equal(model["a"].weight, before)


def test_a_head_that_was_trained_apart_is_not_applied_to_a_tied_one():
    model = build_gpt2(40)
    head = {"lm_head.weight": torch.ones(40, 32)}
    with pytest.raises(UpdateError, match="changes it alone"):
        WeightUpdate.from_tensors(head, base=Weights.of(model)).apply(model)


def test_a_prefix_of_the_model_does_not_matter():
    model = build_gpt2(40)
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    WeightUpdate.from_tensors({"h.0.attn.c_attn.weight": torch.ones(32, 96)}).apply(model)
    torch.testing.assert_close(model.transformer.h[0].attn.c_attn.weight, before + 1)


def test_a_multiple_scales_what_is_read(device):
    update = update_of(device)
    for found, factor in ((3 * update, 3.0), (update * 0.25, 0.25), (-update, -1.0), (-(2 * update), -2.0)):
        for name in update:
            torch.testing.assert_close(found.dense(name), factor * update.dense(name))
            assert isinstance(found[name], LowRank) is isinstance(update[name], LowRank)
            assert found.entries[name].details["scale"] == factor
    with pytest.raises(UpdateError, match="finite"):
        update * float("nan")
    with pytest.raises(TypeError):
        update * "2"


def test_map_and_only():
    update = update_of()
    doubled = update.map(lambda name, value: value * 2, kind="doubled")
    assert {entry.kind for entry in doubled.entries.values()} == {"doubled"}
    torch.testing.assert_close(doubled.dense("fc.weight"), 2 * update.dense("fc.weight"))
    assert list(update.only("weight$")) == ["fc.weight", "conv.weight"]
    assert list(update.only(without=["fc.bias"])) == ["fc.weight", "conv.weight"]
    for names in ("nothing", ["fc.weigth"]):
        with pytest.raises(UpdateError, match="only="):
            update.only(names)
    assert list(WeightUpdate.from_tensors({"a": torch.zeros(2), "b": torch.ones(2)}).changed()) == ["b"]


def test_values_are_read_one_at_a_time():
    alive, most = [], [0]

    class Counted(torch.Tensor):
        def __del__(self):
            alive.pop()

    def read():
        alive.append(0)
        most[0] = max(most[0], len(alive))
        return torch.ones(3).as_subclass(Counted)

    update = WeightUpdate({f"w{n}": Entry(torch.Size([3]), read, layout="other") for n in range(20)})
    for name in update:
        update[name]
    assert most[0] <= 2


# Files


def test_saved_updates_are_read_back_to_the_bit(tmp_path, device):
    path = tmp_path / "update.safetensors"
    values = {
        "low": LowRank.from_factors(normal(5, 2, device=device), normal(2, 3, device=device)),
        "none": LowRank.zeros(4, 3, device=device),
        "wide": normal(3, 2, dtype=torch.float64, device=device),
        "number": torch.tensor(2.0, device=device),
        "empty": torch.zeros(0, 3, device=device),
        "half": normal(7, dtype=torch.bfloat16, device=device),
    }
    facts = {
        "rounded": torch.bfloat16,
        "base_rounded": torch.float16,
        "details": {"rank": 2, "why": "µ|left"},
    }
    update = WeightUpdate.from_tensors(values, **facts)
    update.save(path)
    found = WeightUpdate.load(path)
    assert list(found) == list(values) and found.source == update.source
    for name, value in values.items():
        entry, wanted = found.entries[name], update.entries[name]
        kept = ("shape", "kind", "layout", "rounded", "base_rounded", "details")
        assert all(getattr(entry, field) == getattr(wanted, field) for field in kept)
        if isinstance(value, LowRank):
            assert torch.equal(found[name].left, value.left.cpu())
            assert torch.equal(found[name].right, value.right.cpu())
        else:
            assert torch.equal(found[name], value.cpu()) and found[name].dtype == value.dtype
    with safe_open(path, framework="pt") as file:  # any reader of the format reads it
        assert set(file.keys()) >= {"wide", "low|left", "low|right"}
    assert [child.name for child in tmp_path.iterdir()] == ["update.safetensors"]


def test_magnitudes_and_stages_are_saved(tmp_path):
    entry = Entry(
        torch.Size([2, 2]), lambda: torch.ones(2, 2), kind="dora", magnitude=lambda: torch.arange(2.0)
    )
    one = WeightUpdate({"w": entry})
    whole = WeightUpdate({"w": entry}, stages=[one, -one], skipped={"ids": "a count"})
    whole.save(tmp_path / "u.safetensors")
    found = WeightUpdate.load(tmp_path / "u.safetensors", base={"w": torch.zeros(2, 2)})
    assert torch.equal(found.entries["w"].magnitude(), torch.arange(2.0))
    assert [float(stage["w"].sum()) for stage in found.stages] == [4.0, -4.0]
    assert found.stages[1].entries["w"].magnitude is None and found.skipped == {"ids": "a count"}
    assert torch.equal(found.base_matrix("w"), torch.zeros(2, 2))


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "u.safetensors"
    update_of().save(path)
    content = path.read_bytes()

    def fail(name, value):
        if name == "fc.bias":
            raise BrokenError
        return value

    with pytest.raises(BrokenError):
        update_of().map(fail).save(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["u.safetensors"]


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path):
    update = update_of()
    with pytest.raises(UpdateError, match="no folder"):
        update.save(tmp_path / "nowhere" / "u.safetensors")
    with pytest.raises(UpdateError, match=r"must end with \.safetensors"):
        update.save(tmp_path / "u.pt")
    with pytest.raises(UpdateError, match="plain JSON"):
        update_of(details={"x": torch.ones(1)}).save(tmp_path / "u.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UpdateError, match="is a folder"):
        update.save(tmp_path / "folder.safetensors")
    twice = WeightUpdate.from_tensors(
        {"w": LowRank(torch.ones(2, 1), torch.ones(1, 2)), "w|left": torch.ones(2)}
    )
    with pytest.raises(UpdateError, match=r"two values would be called 'w\|left'"):
        twice.save(tmp_path / "u.safetensors")
    assert os.listdir(tmp_path) == ["folder.safetensors"]
    path = tmp_path / "u.safetensors"
    update.save(path)
    whole = path.read_bytes()
    for cut in (4, 100, len(whole) - 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(UpdateError, match="not a whole safetensors file"):
            WeightUpdate.load(path)
    path.write_bytes(whole.replace(b'\\"entries\\"', b'\\"entrees\\"'))
    with pytest.raises(UpdateError, match="is damaged"):
        WeightUpdate.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(UpdateError, match="newer version"):
        WeightUpdate.load(path)
    LowRank.zeros(2, 2).save(path)
    with pytest.raises(UpdateError, match=r"not written by WeightUpdate\.save"):
        WeightUpdate.load(path)
    with pytest.raises(UpdateError, match="there is no file"):
        WeightUpdate.load(tmp_path / "none.safetensors")


def test_read_update_knows_a_saved_update(tmp_path):
    path, model = tmp_path / "u.safetensors", net()
    update_of().save(path)
    alone, upon = read_update(None, path), read_update(model, path, only="fc")
    assert list(alone) == list(update_of()) and alone.base is None
    assert torch.equal(upon.base_matrix("fc.weight"), model["fc"].weight) and list(upon) == [
        "fc.weight",
        "fc.bias",
    ]
    assert read_update(None, alone) is alone
    with pytest.raises(UpdateError, match=r"has no fc\.weight"):
        read_update(nn.Linear(2, 2), path)
    assert json.loads(json.dumps(update_of().entries["fc.weight"].details)) == {"rank": 2}
