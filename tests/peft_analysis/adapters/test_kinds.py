"""Every kind of adapter that peft merges, against peft's own merge."""

import warnings

import pytest
import torch

from manifolds import LowRank
from peft_analysis import Weights
from peft_analysis.updates.adapters import read_adapter
from tests.peft_analysis.adapters.adapted import built, errors, loaded_and_merged, merged, saved, tuned
from tests.peft_analysis.adapters.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
MODULE_ONLY = {"unilora", "tinylora", "experts, in first", "experts, out first"}
"""Kinds that go by the order of the base's modules, which weights alone do not tell."""
LOW_RANK = {
    "lora", "lora in gpt2", "lora in llama", "pissa", "pissa in gpt2", "olora", "eva", "mica", "adalora",
    "adalora, alpha 0", "vera", "vera, drawn anew", "lokr, in factors", "trainable tokens",
}  # fmt: skip


MERGED = [
    "lora", "lora in gpt2", "lora beside biases", "lora of the head", "lora, batch norm saved", "pissa",
    "lora with biases", "dora in gpt2", "experts, out first", "loha", "ia3", "layer norms", "lora and tokens",
    "osf", "deft",
]  # fmt: skip
MOVES_THE_BASE = ("pissa", "olora", "kasa")
"""Starts that take something off the base inside the live model."""


@pytest.mark.parametrize("case", CASES)
def test_reads_as_peft_merges(case, tmp_path):
    base, config = built(CASES[case].model), CASES[case].config()
    values = {key: value.clone() for key, value in base.state_dict().items()}
    model = tuned(base, config)
    folder = saved(model, tmp_path)
    after = loaded_and_merged(base, folder)

    update = read_adapter(base, folder)
    assert errors(update, after, base) == {}
    assert any(update.dense(found).norm() > 0 for found in update)
    if case in LOW_RANK:
        assert all(isinstance(update[found], LowRank) for found in update)
    if CASES[case].model == "net" and case not in MODULE_ONLY:
        assert errors(read_adapter(Weights.of_module(base), folder), after, base) == {}

    inside = {key: value.clone() for key, value in model.state_dict().items()}
    assert errors(read_adapter(base, model), after, base) == {}
    in_place = CASES[case].options.get("bias", "none") != "none"
    if case in MERGED and not in_place and not case.startswith(MOVES_THE_BASE):
        alone = read_adapter(None, model)
        assert errors(alone, after, base) == {}
        assert all(torch.equal(alone.base[found], values[found]) for found in alone)

    assert all(torch.equal(value, values[key]) for key, value in base.state_dict().items())
    assert all(torch.equal(value, inside[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", MERGED)
def test_merged_adapters_read_as_before(case):
    base = built(CASES[case].model)
    model = tuned(base, CASES[case].config())
    after = merged(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert errors(read_adapter(base, model), after, base) == {}


def test_rotation_by_oft_keeps_singular_values(tmp_path):
    base = built("net")
    update = read_adapter(base, saved(tuned(base, CASES["oft"].config()), tmp_path))
    turned = base.line.weight + update["line.weight"]
    torch.testing.assert_close(
        torch.linalg.svdvals(turned), torch.linalg.svdvals(base.line.weight), rtol=1e-5, atol=1e-6
    )


def test_random_numbers_of_the_caller_are_left_alone(tmp_path):
    base = built("net")
    folder = saved(tuned(base, CASES["randlora"].config()), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    read_adapter(base, folder)["line.weight"]
    assert torch.equal(torch.rand(4), expected)
