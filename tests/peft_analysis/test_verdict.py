import copy
import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from scipy.stats import cauchy

import geoedit
from experiments.verdict_accuracy import Case, Settings, cases, change, judged, made, right, run
from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.origin import common_rank, place
from peft_analysis.updates import Weights, WeightUpdate, read_update
from peft_analysis.verdict import combined, verdict

SMALL = Settings.small()
GRID = list(cases(SMALL))


@pytest.mark.parametrize("case", GRID, ids=lambda c: f"{c.origin} {c.rank} {c.exponent} {c.stored} {c.base}")
def test_simulated_updates(case):
    row = judged(case, SMALL.blocks)
    assert right(row), row
    if case.origin in ("merged LoRA", "edit"):
        assert row["found_rank"] == case.rank
    if case.origin == "ReLoRA":
        assert (row["found_rank"], row["found_stages"]) == (case.rank * case.stages, case.stages)
    assert row["p_value"] < 0.01 or case.origin == "none"


@pytest.mark.parametrize("origin", ["merged LoRA", "full fine-tune"])
def test_what_the_noise_hides_is_not_guessed(origin):
    case = Case(origin, rank=16, shape=(64, 80), norm=1e-3, exponent=1.0 * (origin != "merged LoRA"))
    assert judged(case, 1)["statement"] in ("unknown", {"merged LoRA": "low rank"}.get(origin, "full rank"))


def test_a_change_far_below_the_grid_is_unknown_or_nothing(device):
    base = torch.randn(80, 90, generator=torch.Generator().manual_seed(0)).bfloat16().float().to(device)
    tuned = base.clone()
    tuned[3, 4] = torch.nextafter(tuned[3, 4].bfloat16(), torch.tensor(9.0).bfloat16()).float()
    facts = {"rounded": torch.bfloat16, "base_rounded": torch.bfloat16}
    update = WeightUpdate.from_tensors({"w": tuned - base}, base=Weights.of_tensors({"w": base}), **facts)
    found = verdict(update)
    assert found.matrices["w"].moved == pytest.approx(1 / 7200) and found.statement != "full rank"


def almanac_lora(rank, dtype):
    """The almanac's model, and a copy with a LoRA on two of its matrices, random in both factors."""
    model = geoedit.testbeds.load("almanac-gpt2")[0]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn"],
        layers_to_transform=[0, 1],
        fan_in_fan_out=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        adapted = peft.get_peft_model(copy.deepcopy(model).to(dtype), config)
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.02)
    return model, adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_merged_by_peft_into_a_trained_model(dtype):
    model, adapted = almanac_lora(4, dtype)
    live = verdict(read_update(model, adapted))
    assert (live.statement, live.origin, live.rank) == ("low rank", "adapter", 4)
    tuned = adapted.merge_and_unload()
    found = verdict(read_update(model, tuned, only=r"h\.[01]\.(attn|ln)"))
    assert found.statement == "low rank" and found.rank == 4
    changed = [name for name, one in found.matrices.items() if one.statement != "none"]
    assert changed == [f"transformer.h.{block}.attn.c_attn.weight" for block in (0, 1)]


def test_adapters_and_factors_are_exact(device):
    draw = torch.Generator().manual_seed(0)
    factors = LowRank.from_factors(torch.randn(40, 3, generator=draw), torch.randn(3, 30, generator=draw))
    found = verdict(
        WeightUpdate.from_tensors({"x.0.w": factors.to(device), "x.1.w": 0 * factors}, kind="lora")
    )
    assert (found.statement, found.origin, found.rank, found.p_value) == ("low rank", "adapter", 3, 0.0)
    assert found.matrices["x.1.w"].statement == "none" and found.matrices["x.0.w"].exact
    whole = verdict(WeightUpdate.from_tensors({"w": torch.randn(30, 40, generator=draw)}, kind="lokr"))
    assert (whole.statement, whole.origin) == ("full rank", "adapter")


def test_stages_that_are_known_are_a_staircase():
    draw = torch.Generator().manual_seed(0)
    weights = [{"blocks.0.w": torch.randn(64, 80, generator=draw).bfloat16()}]
    for rank in (2, 3):
        case = Case("merged LoRA", rank=rank, shape=(64, 80), norm=0.03)
        weights.append({"blocks.0.w": change(weights[-1]["blocks.0.w"], case, draw)})
    base, *tuned = (Weights.of_tensors(one) for one in weights)
    found = verdict(read_update(base, tuned))
    assert (found.origin, found.stages, found.statement) == ("ReLoRA", 2, "low rank")
    assert found.p_value < 0.01 and any("stages: 2, 3" in line for line in found.evidence)


def test_without_the_base_a_clear_fall_is_low_rank_and_noise_alone_is_unknown():
    update = made(Case("merged LoRA", rank=2, shape=(64, 80), norm=0.1, base="float32"), 1)
    names = update.matrices()
    alone = WeightUpdate.from_tensors({name: update[name] for name in names}, rounded=torch.bfloat16)
    found = verdict(alone)
    assert {one.statement for one in found.matrices.values()} == {"low rank"} and found.rank == 2
    noise = made(Case("none", shape=(64, 80), base="float32"), 1)
    silent = WeightUpdate.from_tensors({name: noise[name] for name in names}, rounded=torch.bfloat16)
    assert verdict(silent).statement == "unknown"


def test_a_tuned_copy_that_was_rounded_and_widened_again_is_seen_through():
    update = made(Case("none", shape=(64, 80), base="float32"), 1)
    base = update.base
    widened = WeightUpdate.from_tensors(
        {name: update[name] for name in update}, base=base, rounded=torch.float32, base_rounded=torch.float32
    )
    found = verdict(widened)
    assert (found.statement, found.origin) == ("none", "none")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_base_that_is_a_rounded_copy_adds_noise_of_its_own(rank):
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(90, 120, generator=draw)
    update = 0.05 * torch.randn(90, rank, generator=draw) @ torch.randn(rank, 120, generator=draw)
    base, tuned = ({"blocks.0.w": values} for values in (exact.bfloat16(), exact + update))
    found = verdict(read_update(Weights.of_tensors(base), Weights.of_tensors(tuned)))
    assert found.statement == ("low rank" if rank else "none") and (found.rank or 0) == rank


def test_same_seed_same_verdict_and_plain_values():
    update = made(Case("merged LoRA", rank=4, shape=(64, 80)), 1)
    one, two = (verdict(update, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    json.dumps(one.to_dict(), allow_nan=False)
    assert "merged LoRA: low rank (rank 4)" in str(one) and str(one).count("\n- ") == len(one.evidence)
    again = verdict(update, known=one.matrices)
    assert again.matrices == dict(one.matrices)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (WeightUpdate({}), "holds no parameter"),
        (
            WeightUpdate.from_tensors({"w": torch.full((9, 9), math.nan)}, rounded=torch.float16),
            "w: the diff",
        ),
        (WeightUpdate.from_tensors({"w": torch.full((9, 9), math.nan)}), "finite"),
        (WeightUpdate.from_tensors({"b": torch.full((9,), math.inf)}), "b: the difference"),
    ],
)
def test_bad_updates_are_refused(update, message):
    with pytest.raises(UpdateError, match=message):
        verdict(update)


def test_levels_are_checked():
    with pytest.raises(UpdateError, match="level is 2"):
        verdict(made(GRID[0], 1), level=2.0)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (3, 4)])
def test_thin_matrices_get_an_answer(shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tuned = (base + 0.5).bfloat16().float()
    update = WeightUpdate.from_tensors(
        {"w": tuned - base}, base=Weights.of_tensors({"w": base}), rounded=torch.bfloat16
    )
    assert verdict(update).matrices["w"].statement in ("full rank", "low rank", "unknown")


def test_p_values_are_combined_as_cauchy_variables():
    for ps in ([0.2, 0.7, 0.01], [0.5], [1e-9, 0.9]):
        expected = cauchy.sf(sum(cauchy.isf(p) for p in ps) / len(ps))
        assert combined(ps) == pytest.approx(expected, rel=1e-6)
    assert combined([0.0, 0.3]) < 1e-200 and math.isnan(combined([])) and combined([1.0, 1.0]) > 0.99


def test_names_lose_their_block():
    assert place("model.layers.7.mlp.down_proj.weight") == ("model.layers.#.mlp.down_proj.weight", 7)
    assert place("0.weight") == ("#.weight", 0) and place("wte.weight") == ("wte.weight", None)


def test_the_common_rank_lies_in_most_intervals():
    (one,) = verdict(WeightUpdate.from_tensors({"w": torch.ones(4, 5)})).matrices.values()
    low = [
        replace(one, rank=r, rank_low=a, rank_high=b)
        for r, a, b in ((3, 3, 3), (3, 3, 5), (5, 2, 5), (9, 9, 9))
    ]
    assert common_rank(low) == (3, 0.75) and common_rank([]) == (None, 0.0)


def test_the_measurement_writes_its_table(tmp_path):
    found = run(Settings.small(tmp_path), every=9)
    saved = json.loads((tmp_path / "verdict_accuracy.json").read_text())
    assert len(saved["rows"]) == len(found["rows"]) == len(GRID[::9])
    page = (tmp_path / "verdict_accuracy.md").read_text()
    assert "| all |" in page and str(tmp_path) not in page
