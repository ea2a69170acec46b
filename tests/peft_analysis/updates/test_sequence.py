"""Runs of several steps: the whole against the last checkpoint, each stage against its subtraction."""

import copy

import pytest
import torch
from torch import nn

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.read import read_update
from peft_analysis.updates.weight_update import WeightUpdate


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rank_one(seed, device="cpu"):
    return LowRank.from_factors(
        normal(5, 1, seed=seed, device=device), normal(1, 6, seed=seed + 50, device=device)
    )


def run(device="cpu", steps=3):
    """A base, and the checkpoints after each of some rank-one steps."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5).to(device)
    checkpoints = []
    for number in range(steps):
        model = copy.deepcopy(checkpoints[-1] if checkpoints else base)
        with torch.no_grad():
            model.weight += rank_one(number, device).dense()
        checkpoints.append(model)
    return base, checkpoints


def test_checkpoints_in_a_row(device):
    base, checkpoints = run(device)
    update = read_update(base, checkpoints)
    torch.testing.assert_close(update["weight"], checkpoints[-1].weight - base.weight, rtol=0, atol=0)
    for number, stage in enumerate(update.stages):
        torch.testing.assert_close(stage["weight"], rank_one(number, device).dense(), rtol=0, atol=1e-6)
        assert torch.linalg.matrix_rank(stage["weight"], rtol=1e-5) == 1
    assert torch.linalg.matrix_rank(update["weight"], rtol=1e-5) == 3
    assert {entry.kind for entry in update.entries.values()} == {"sequence"}
    assert update.entries["weight"].details["stages"] == [0, 1, 2]


def test_adapters_in_a_row_stay_low_rank(device):
    steps = [WeightUpdate.from_tensors({"weight": rank_one(n, device)}) for n in range(3)]
    update = read_update(None, steps)
    value = update["weight"]
    assert isinstance(value, LowRank) and value.rank == 3
    torch.testing.assert_close(value.dense(), sum(rank_one(n, device).dense() for n in range(3)))
    assert update.entries["weight"].details["stage_ranks"] == [1, 1, 1]
    assert update.entries["weight"].rounded is None


@pytest.mark.parametrize("last", ["adapter", "checkpoint"])
def test_a_mixture_of_adapters_and_checkpoints(last, device):
    base, checkpoints = run(device)
    steps = [WeightUpdate.from_tensors({"weight": rank_one(n, device)}) for n in range(3)]
    mixed = [steps[0], checkpoints[1], steps[2]] if last == "adapter" else [*steps[:2], checkpoints[2]]
    update = read_update(base, mixed)
    torch.testing.assert_close(update["weight"], checkpoints[2].weight - base.weight, rtol=0, atol=2e-6)
    for number, stage in enumerate(update.stages):
        torch.testing.assert_close(stage.dense("weight"), rank_one(number, device).dense(), rtol=0, atol=2e-6)
    assert update.entries["weight"].rounded == torch.float32


def test_steps_that_change_other_parameters():
    steps = [{"a": rank_one(0)}, {"b": torch.ones(3)}, {"a": normal(5, 6)}]
    update = read_update(None, [WeightUpdate.from_tensors(step) for step in steps])
    assert list(update) == ["a", "b"] and update.entries["b"].details["stages"] == [1]
    torch.testing.assert_close(update["a"], rank_one(0).dense() + normal(5, 6))


def test_folders_in_a_row_and_only(tmp_path):
    base, checkpoints = run()
    paths = []
    for number, model in enumerate([base, *checkpoints]):
        paths.append(tmp_path / f"{number}.bin")
        torch.save(model.state_dict(), paths[-1])
    update = read_update(paths[0], paths[1:], only="weight")
    assert list(update) == ["weight"] and [list(stage) for stage in update.stages] == [["weight"]] * 3
    torch.testing.assert_close(update["weight"], checkpoints[-1].weight - base.weight)
    update.save(tmp_path / "run.safetensors")
    again = read_update(paths[0], tmp_path / "run.safetensors")
    for first, second in zip((update, *update.stages), (again, *again.stages), strict=True):
        assert torch.equal(first["weight"], second["weight"])


def test_what_is_wrong_says_which_step():
    base, checkpoints = run()
    with pytest.raises(UpdateError, match="the sequence is empty"):
        read_update(base, [])
    with pytest.raises(UpdateError, match="step 2 of 3"):
        read_update(base, [checkpoints[0], nn.Linear(2, 2), checkpoints[1]])
    with pytest.raises(UpdateError, match=r"step 1 of 1.*beside the base"):
        read_update(None, [checkpoints[0]])
    steps = [WeightUpdate.from_tensors({"weight": torch.ones(shape)}) for shape in ((2, 2), (2, 3))]
    with pytest.raises(UpdateError, match="weight has the shapes"):
        read_update(None, steps)
