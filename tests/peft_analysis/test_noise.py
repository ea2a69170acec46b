"""The noise edge and the rank above it, on updates whose rank is known."""

import json
import math

import pytest
import torch

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.noise import noise_edge, true_rank
from peft_analysis.rounding import Rounding, balance, largest_singular_value, storage_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base_of(shape, profile="even", dtype=FP32):
    """Weights as a checkpoint holds them, with rows or columns of unequal size."""
    rows, columns = shape
    base = draw(*shape, seed=1) / math.sqrt(columns)
    if profile == "rows":
        base = base * torch.logspace(-2, 1, rows, dtype=torch.float64)[:, None]
    if profile == "columns":
        base[:, :3] *= 50
    if profile == "heavy":
        base = base / draw(*shape, seed=2).abs().clamp_min(0.05)
    return base.to(dtype).double()


def update_of(base, rank, size, fall=1.0, seed=3):
    """An update of a rank, of a size relative to the base; its singular values fall by a factor each."""
    rows, columns = base.shape
    left, right = (torch.linalg.qr(draw(side, rank, seed=seed))[0] for side in (rows, columns))
    update = left * fall ** torch.arange(rank, dtype=torch.float64) @ right.mT
    return update * (size * base.norm() / update.norm())


def read(base, update, dtype):
    """What is read from the two checkpoints: the difference in float32, and the base."""
    return ((base + update).to(dtype).double() - base).float(), base.float()


@pytest.mark.parametrize(
    ("stored", "rank", "size"),
    [
        ((BF16, FP32), 1, 1e-1),
        ((BF16, FP32), 8, 1e-2),
        ((BF16, FP32), 30, 5e-2),
        ((BF16, BF16), 1, 1e-2),
        ((BF16, BF16), 8, 3e-2),
        ((FP16, FP16), 8, 1e-2),
        ((FP16, FP16), 30, 5e-2),
    ],
)
def test_rank_of_a_merged_update(stored, rank, size, device):
    base = base_of((192, 288) if rank == 1 else (176, 128), dtype=stored[1])
    difference, base = (part.to(device) for part in read(base, update_of(base, rank, size), stored[0]))
    found = true_rank(difference, base=base)
    assert (found.low, found.rank, found.high) == (rank, rank, rank)
    assert found.reliable
    assert found.method == "simulated rounding"
    assert int(torch.linalg.matrix_rank(difference)) > 3 * rank  # what is counted without the edge


@pytest.mark.parametrize(
    ("profile", "stored", "rank", "size"),
    [
        ("rows", (BF16, FP32), 8, 1e-3),  # hidden behind the noise of the largest rows
        ("rows", (BF16, BF16), 48, 1e-3),  # a third of the entries do not move
        ("columns", (BF16, FP32), 48, 1e-2),  # the noise of three columns stands above it
        ("columns", (BF16, BF16), 8, 1e-3),
        ("columns", (FP16, FP16), 1, 3e-2),
        ("heavy", (BF16, FP32), 8, 3e-2),
    ],
)
def test_rank_where_rows_columns_and_entries_differ_in_size(profile, stored, rank, size):
    base = base_of((160, 224), profile, stored[1])
    difference, base = read(base, update_of(base, rank, size), stored[0])
    found = true_rank(difference, base=base)
    assert (found.low, found.rank, found.high) == (rank, rank, rank)


def test_the_edge_is_told_of_the_difference_itself_where_the_rank_was_found_in_another_matrix():
    base = base_of((224, 320), "rows")
    difference, base = read(base, update_of(base, 4, 3e-2), BF16)
    found = noise_edge(difference, base=base)
    values = torch.linalg.svdvals(difference.double())
    assert found.values.double().numpy() == pytest.approx(values.numpy(), rel=1e-3)
    assert found.edge == pytest.approx(float(values[4]), rel=0.15)
    assert found.balanced.count == found.count == 4
    assert found.balanced.edge == pytest.approx(found.balanced.first_noise, rel=0.05)
    assert json.loads(json.dumps(found.to_dict()))["balanced"]["count"] == 4
    even = base_of((96, 128))
    difference, even = read(even, update_of(even, 4, 3e-2), BF16)
    assert noise_edge(difference, base=even).balanced is None


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_balance_is_of_rank_one_and_evens_out_the_errors_of_rounding(dtype, device):
    stored = base_of((80, 120), "rows")
    stored[:, :3] *= 32
    stored[5] = 0
    stored[7, ::2] = 0
    scale = balance(stored.to(device), dtype).cpu()
    assert torch.equal(scale, scale[:, :1] * scale[:1] / scale[0, 0])
    assert torch.equal(scale.log2(), scale.log2().round())
    errors = ((stored.to(dtype).double() - stored) * scale).square()
    for side in (0, 1):
        mean = errors.sum(side) / (stored != 0).sum(side).clamp_min(1)
        assert mean[mean > 0].max() < 12 * mean[mean > 0].min()
    assert balance(base_of((80, 120)), dtype) is None
    assert balance(torch.zeros(3, 4), dtype) is None


@pytest.mark.parametrize("stored", [(BF16, FP32), (BF16, BF16)])
def test_one_large_edit_is_one_direction(stored):
    base = base_of((128, 176), dtype=stored[1])
    key = draw(176, seed=7) * torch.logspace(-2, 0, 176, dtype=torch.float64)
    edit = torch.outer(draw(128, seed=8), key)
    difference, base = read(base, edit * (0.3 * base.norm() / edit.norm()), stored[0])
    found = true_rank(difference, base=base)
    assert (found.low, found.rank, found.high) == (1, 1, 1)


@pytest.mark.parametrize("stored", [(BF16, FP32), (BF16, BF16), (FP16, FP16)])
def test_edge_is_where_the_noise_of_the_known_update_ends(stored):
    base = base_of((192, 256), dtype=stored[1])
    update = update_of(base, 8, 2e-2)
    difference, base = read(base, update, stored[0])
    found = noise_edge(difference, base=base)
    first = torch.linalg.svdvals(difference.double())[8]
    assert found.edge == pytest.approx(float(first), rel=0.04)
    assert found.interval[0] < found.first_noise < found.interval[1]
    assert found.first_noise == pytest.approx(float(first), rel=1e-4)
    assert abs(found.hidden) < 3 * found.hidden_error


def test_mostly_unmoved_entries_still_tell_a_rank_and_are_reported():
    base = base_of((256, 256), dtype=BF16)
    difference, base = read(base, update_of(base, 2, 1e-3), BF16)
    assert float((difference == 0).double().mean()) > 0.6
    found = true_rank(difference, base=base)
    assert found.low <= 2 <= found.high
    assert "did not move" in found.reason


def test_an_update_below_the_noise_has_no_known_rank():
    base = base_of((200, 200))
    difference, base = read(base, update_of(base, 8, 1e-5), BF16)
    found = true_rank(difference, base=base)
    assert (found.rank, found.low, found.high) == (0, 0, 200)
    assert not found.reliable
    assert "rounding noise" in found.reason


@pytest.mark.parametrize("stored", [(BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("fall", [1.0, 0.97])
def test_full_rank_is_not_called_low(stored, fall):
    base = base_of((64, 96), dtype=stored[1])
    difference, base = read(base, update_of(base, 64, 5e-2, fall), stored[0])
    found = true_rank(difference, base=base)
    assert found.high == 64
    assert found.rank > 32


def test_a_spectrum_that_fades_into_the_noise_gets_a_wide_interval():
    base = base_of((160, 160))
    difference, base = read(base, update_of(base, 8, 2e-3, 0.5), BF16)
    found = true_rank(difference, base=base)
    assert found.low < 8 <= found.high
    assert found.high > found.rank


def test_merged_twice_has_the_sum_of_ranks():
    base = base_of((144, 128))
    first, second = (update_of(base, 6, 3e-2, seed=seed) for seed in (11, 12))
    tuned = ((base + first).to(BF16).double() + second).to(BF16)
    found = true_rank((tuned.double() - base).float(), base=base.float())
    assert (found.low, found.rank, found.high) == (12, 12, 12)


def test_a_merge_in_half_precision_throughout():
    base = base_of((128, 176), dtype=BF16)
    update = update_of(base, 8, 2e-2)
    tuned = base.to(BF16) + update.to(BF16)  # the update itself is rounded before it is added
    found = true_rank((tuned.double() - base).float(), base=base.float())
    assert found.low <= 8 <= found.high
    assert found.rank == 8


def test_a_coarser_base_is_the_one_that_was_rounded():
    exact = base_of((128, 176))
    tuned, base = (exact + update_of(exact, 8, 2e-2)).float(), exact.to(BF16).float()
    found = true_rank(tuned - base, base=base, tuned=tuned)
    assert (found.low, found.rank, found.high) == (8, 8, 8)


def test_frozen_rows_and_a_zero_base():
    base = base_of((96, 112), dtype=BF16)
    update = update_of(base, 4, 2e-2)
    update[50:] = 0
    difference, stored = read(base, update, BF16)
    assert true_rank(difference, base=stored).rank == 4
    fresh = update_of(base, 4, 1.0)
    found = true_rank(fresh.to(BF16).float(), base=torch.zeros_like(stored))
    assert (found.low, found.rank, found.high) == (4, 4, 4)


@pytest.mark.parametrize("stored", [(BF16, FP32), (BF16, BF16)])
def test_without_the_base_signs_are_drawn(stored):
    base = base_of((160, 224), dtype=stored[1])
    difference, _ = read(base, update_of(base, 8, 2e-2), stored[0])
    found, edge = true_rank(difference), noise_edge(difference)
    assert (found.rank, found.low, found.high) == (8, 8, 8)
    assert found.method == "random signs"
    assert edge.edge == pytest.approx(float(torch.linalg.svdvals(difference)[8]), rel=0.06)
    assert math.isnan(edge.hidden)


def test_without_the_base_full_rank_is_not_known():
    found = true_rank(draw(60, 80).float())
    assert (found.high, found.reliable) == (60, False)
    assert "base" in found.reason


@pytest.mark.parametrize("given", ["difference", "base"])
def test_a_difference_in_float32_is_exact_but_for_its_last_digit(given):
    base = base_of((96, 128)).float()
    tuned = base + update_of(base.double(), 5, 1e-2).float()
    found = true_rank(tuned - base, **({"base": base} if given == "base" else {}))
    assert (found.low, found.rank, found.high) == (5, 5, 5)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_factors_are_exact(rank, device):
    update = LowRank(draw(30, rank).to(device), draw(rank, 40, seed=1).to(device))
    found = true_rank(update)
    assert (found.rank, found.low, found.high) == (rank, rank, rank)
    assert (found.reliable, found.method) == (True, "exact")


@pytest.mark.parametrize("matrix", [torch.zeros(5, 7), torch.zeros(5, 0)])
def test_no_difference_has_rank_zero(matrix):
    found = true_rank(matrix, base=torch.ones_like(matrix))
    assert (found.rank, found.low, found.high, found.reliable) == (0, 0, 0, True)
    assert found.reason == "no entry differs"


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (2, 3)])
def test_the_smallest_matrices(shape):
    base = base_of(shape)
    difference, base = read(base, base * 0.5, BF16)
    found = true_rank(difference, base=base)
    assert 0 <= found.low <= found.rank <= found.high <= min(shape)
    assert found.high >= 1


def test_transposed_and_scaled_by_a_power_of_two_alike():
    base = base_of((128, 192))
    difference, base = read(base, update_of(base, 4, 2e-2), BF16)
    found = true_rank(difference, base=base)
    turned = true_rank(difference.mT * 4, base=base.mT * 4)
    assert (turned.rank, turned.low, turned.high) == (found.rank, found.low, found.high)
    assert turned.edge == pytest.approx(4 * found.edge, rel=0.05)


def test_same_seed_same_bits_and_plain_numbers():
    base = base_of((96, 64))
    difference, base = read(base, update_of(base, 4, 1e-2), BF16)
    seeds = (torch.Generator().manual_seed(5) for _ in range(2))
    first, again = (noise_edge(difference, base=base, generator=seed) for seed in seeds)
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict())
    assert "values" not in first.to_dict()
    assert json.loads(json.dumps(true_rank(difference, base=base).to_dict()))["rank"] == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"difference": torch.ones(3)}, "update.matrix"),
        ({"difference": torch.ones(3, 4), "base": torch.ones(4, 3)}, r"base is \(4, 3\)"),
        ({"difference": torch.ones(3, 4), "tuned": torch.ones(3, 5)}, r"tuned is \(3, 5\)"),
        ({"difference": torch.full((3, 4), math.nan)}, "12 of 12 entries"),
        ({"difference": torch.ones(3, 4), "base": torch.full((3, 4), math.inf)}, "base: 12 of 12"),
    ],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(UpdateError, match=says):
        true_rank(**arguments)


def test_largest_singular_value_beside_a_subspace(device):
    matrix = draw(90, 70, seed=4).to(device)
    left, right = (torch.linalg.qr(draw(side, 3, seed=side))[0].to(device) for side in (90, 70))
    beside = matrix - left @ (left.mT @ matrix)
    beside = beside - beside @ right @ right.mT
    found = largest_singular_value(matrix, left, right)
    assert found == pytest.approx(float(torch.linalg.svdvals(beside)[0]), rel=1e-6)
    assert largest_singular_value(matrix, torch.eye(90, device=device).double(), right) == 0


def test_fit_undoes_the_thinning():
    base = base_of((192, 192), dtype=BF16)
    update = update_of(base, 2, 2e-3)
    rounding = Rounding(base, BF16, aligned=True)
    difference = rounding.read(update)
    left, values, right = torch.linalg.svd(difference)
    cut = (left[:, :2] * values[:2]) @ right[:2]
    outer, sizes, inner = rounding.fit(difference, left[:, :2], values[:2], right[:2].mT)
    fitted = (outer * sizes) @ inner.mT
    assert float((fitted - update).norm()) < 0.5 * float((cut - update).norm())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_stored_dtype_is_found(dtype):
    values = draw(20, 30).to(dtype).double()
    assert storage_dtype(values, None) == dtype
    assert storage_dtype(values, FP32) == dtype
    assert storage_dtype(draw(20, 30), None) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_large_update_that_was_rounded_itself(rank, dtype):
    draw = torch.Generator().manual_seed(rank)
    base, B, A = (torch.randn(size, generator=draw) for size in ((200, 160), (200, rank), (rank, 160)))
    product = B @ A
    update = (product * (0.3 * base.norm() / product.norm())).to(dtype).float()
    base = base.to(dtype).float()
    tuned = (base + update).to(dtype).float()
    found = true_rank(tuned - base, base=base, tuned=tuned, rounded=dtype, base_rounded=dtype)
    assert (found.rank, found.low, found.high) == (rank, rank, rank)


@pytest.mark.parametrize("seed", [6, 22, 36])
def test_the_error_of_one_large_weight_is_no_component(seed, device):
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = 0.03 * torch.distributions.StudentT(3.0).sample((96, 128))
    update = torch.randn(96, 2, generator=draw) @ torch.randn(2, 128, generator=draw) * 0.01
    tuned = (base + update).half().float()
    found = true_rank((tuned - base).to(device), base=base.to(device), tuned=tuned.to(device))
    assert found.rank == 2 and found.low <= 2
