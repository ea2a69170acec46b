import math

import numpy as np
import pytest
import torch

from peft_analysis.remainder import continued, grid, remainder, spacing, unspiked


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rest(difference, base, rank, rounded, same_grid=False):
    generator = torch.Generator().manual_seed(0)
    return remainder(difference, base, rank, rounded=rounded, same_grid=same_grid, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_spacing_is_numpys(dtype, device):
    values = torch.cat([drawn(0, 400), 10 ** (3 * drawn(1, 400)), torch.tensor([0.0, 1.0, 2.0, 1e-7, 0.5])])
    values = values.clamp(-6e4, 6e4).to(dtype)
    expected = np.abs(np.spacing(values.numpy())).astype(np.float64)
    assert np.array_equal(spacing(values.to(device), dtype).cpu().numpy(), expected)


def test_spacing_of_bfloat16_is_the_step_to_the_next_number():
    values = (10 ** (3 * drawn(0, 500))).bfloat16()
    step = torch.nextafter(values, torch.full_like(values, math.inf)).double() - values.double()
    assert torch.equal(spacing(values, torch.bfloat16), step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_checkpoint_is_on_its_old_grid(dtype):
    values = drawn(0, 40, 50)
    assert grid(values.to(dtype).float(), torch.float32) == dtype
    assert grid(values, torch.float32) == torch.float32
    assert grid(values.to(dtype), dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merges", [1, 3, 5])
def test_the_remainder_counts_merges(dtype, merges, device):
    base = drawn(0, 120, 200).to(dtype).float().to(device)
    tuned = base
    for merge in range(merges):
        step = 0.03 * drawn(1 + merge, 120, 4) @ drawn(11 + merge, 4, 200)
        tuned = (tuned + step.to(device)).to(dtype).float()
    found = rest(tuned - base, base, 4 * merges, dtype, same_grid=True)
    assert found.roundings == pytest.approx(merges, abs=0.06 * merges + 4 * found.roundings_error)
    assert abs(found.excess) < 0.05 * merges and found.moved > 0.8


def test_a_planted_tail_is_measured_in_units_of_rounding():
    base, noise = drawn(0, 150, 260), drawn(1, 150, 260)
    once = float((base.double().abs().log2().floor().exp2() * 2.0**-7).square().mean()) / 12
    for share in (0.0, 0.2, 3.0):
        update = 0.03 * drawn(2, 150, 1) @ drawn(3, 1, 260) + math.sqrt(share * once) * noise
        found = rest((base + update).bfloat16().float() - base, base, 1, torch.bfloat16)
        assert found.excess == pytest.approx(share, abs=0.02 + 0.05 * share)
        assert found.roundings == pytest.approx(1, abs=0.05 * (1 + share) + 4 * found.roundings_error)


def test_hidden_rank_is_the_energy_over_that_of_a_value_at_the_edge():
    base = drawn(0, 100, 300)
    found = rest((base + 0.05 * drawn(1, 100, 300)).bfloat16().float() - base, base, 0, torch.bfloat16)
    edge = found.noise * (math.sqrt(100) + math.sqrt(300))
    assert found.hidden_rank == pytest.approx(found.excess * found.noise**2 * 100 * 300 / edge**2)
    assert math.isnan(found.tail)


def test_large_matrices_take_the_short_way_to_the_same_answer(monkeypatch):
    base = drawn(0, 200, 240)
    tuned = (base + 0.02 * drawn(1, 200, 5) @ drawn(2, 5, 240)).bfloat16().float()
    whole = rest(tuned - base, base, 5, torch.bfloat16)
    monkeypatch.setattr("peft_analysis.remainder.WHOLE", 100)
    monkeypatch.setattr("peft_analysis.remainder.ROWS", 60)
    short = rest(tuned - base, base, 5, torch.bfloat16)
    assert short.roundings == pytest.approx(whole.roundings, abs=4 * short.roundings_error)
    assert short.singular_values == pytest.approx(whole.singular_values, rel=1e-4)


def test_transposed_matrices_are_the_same():
    base = drawn(0, 90, 140)
    difference = (base + 0.02 * drawn(1, 90, 3) @ drawn(2, 3, 140)).half().float() - base
    one, other = (rest(d, b, 3, torch.float16) for d, b in ((difference, base), (difference.mT, base.mT)))
    assert (
        one == pytest.approx(other)
        if isinstance(one, tuple)
        else one.roundings == pytest.approx(other.roundings)
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_power_law_is_continued(exponent):
    values = 7 * torch.arange(1, 201, dtype=torch.float64).pow(-exponent)
    expected = float(values[50:].square().sum())
    assert continued(values[:50], 200) == pytest.approx(expected, rel=1e-6)


def test_noise_is_taken_off_the_values():
    m, n, variance = 300, 400, 0.01
    planted = torch.tensor([9.0, 7.0, 5.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(drawn(seed, size, 3).double())[0] for seed, size in ((0, m), (1, n)))
    noisy = left * planted @ right.mT + math.sqrt(variance) * drawn(2, m, n).double()
    seen = torch.linalg.svdvals(noisy)[:3]
    assert torch.allclose(unspiked(seen, (m, n), variance), planted, atol=0.15)
    assert float((seen - planted).abs().max()) > 0.3
