"""Spectra against numpy in float64, closed forms and WeightWatcher."""

import json
import math

import numpy as np
import pytest
import torch

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.spectral_laws import chance_of_distance, fit_bulk, fit_power_law, quantiles, upper_quantile
from peft_analysis.spectrum import singular_values, spectrum


def draw(*shape, seed=0, dtype=torch.float32, device=None):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


def reference(matrix):
    return np.linalg.svd(matrix.detach().double().cpu().numpy(), compute_uv=False)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33), (9000, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dense_values_are_those_of_numpy(shape, dtype, device):
    matrix = draw(*shape, dtype=dtype, device=device)
    found = singular_values(matrix)
    assert found.device == matrix.device
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(matrix)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=3e-7 * expected[0])


def test_small_values_of_float32_are_better_than_a_float32_decomposition_gives():
    left, right = (torch.linalg.qr(draw(80, 80, seed=s, dtype=torch.float64))[0] for s in (1, 2))
    matrix = (left * torch.logspace(0, -4, 80, dtype=torch.float64) @ right).float()
    expected = reference(matrix)
    np.testing.assert_allclose(singular_values(matrix).numpy(), expected, rtol=1e-5)


def test_float64_keeps_values_that_a_gram_matrix_would_lose():
    matrix = torch.diag(torch.logspace(0, -14, 15, dtype=torch.float64))
    np.testing.assert_allclose(singular_values(matrix).numpy(), reference(matrix), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_values_neither_overflow_nor_vanish(scale):
    matrix = draw(20, 30) * scale
    found = spectrum(matrix)
    assert found.effective_rank == pytest.approx(spectrum(draw(20, 30)).effective_rank, rel=1e-5)
    np.testing.assert_allclose(found.singular_values.numpy(), reference(matrix), rtol=1e-5)


def test_a_batch_of_matrices_is_a_batch_of_lists(device):
    matrices = draw(3, 8, 5, device=device)
    expected = np.stack([reference(matrix) for matrix in matrices])
    np.testing.assert_allclose(singular_values(matrices).cpu().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("stored", [1, 6, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_give_the_values_of_their_product(stored, dtype, device):
    left, right = (draw(*size, dtype=dtype, device=device) for size in ((50, stored), (stored, 70)))
    update = LowRank(left, right)
    found = spectrum(update)
    product = update.left.double() @ update.right.double()
    expected = reference(product)[: min(stored, 50)]
    np.testing.assert_allclose(found.singular_values.cpu().numpy(), expected, atol=1e-5 * expected[0])
    assert found.exact
    assert found.rank == min(stored, 50)
    assert found.residual < 1e-5
    assert found.frobenius == pytest.approx(float(product.norm()), rel=1e-5)


def test_numbers_of_a_known_spectrum():
    found = spectrum(torch.diag(torch.tensor([4.0, 3.0, 0.0])))
    shares, energies = np.array([4, 3]) / 7, np.array([16, 9]) / 25
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert found.entropy == pytest.approx(-(energies * np.log(energies)).sum() / math.log(2), rel=1e-6)
    assert found.stable_rank == pytest.approx(25 / 16)
    assert found.participation_ratio == pytest.approx(625 / (256 + 81))
    assert (found.nuclear, found.frobenius, found.spectral) == pytest.approx((7, 5, 4))
    assert found.energy_ranks == {0.5: 1, 0.9: 2, 0.95: 2, 0.99: 2}
    assert (found.rank, found.shape, found.exact) == (2, (3, 3), False)


def test_equal_values_have_all_ranks_equal():
    found = spectrum(torch.eye(10, 14, dtype=torch.float64) * 3)
    ranks = (found.effective_rank, found.stable_rank, found.participation_ratio)
    assert ranks == pytest.approx((10, 10, 10))
    assert found.entropy == pytest.approx(1)
    assert found.energy_ranks == {0.5: 5, 0.9: 9, 0.95: 10, 0.99: 10}
    assert "the same" in found.power_law.reason


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (64, 64)])
def test_conventions_are_those_of_weightwatcher(shape):
    rmt = pytest.importorskip("weightwatcher.RMT_Util")
    matrix = draw(*shape, seed=3)
    found, values = spectrum(matrix), reference(matrix).astype(np.float32)
    assert found.stable_rank == pytest.approx(float(rmt.stable_rank(values**2.0)), rel=1e-5)
    assert found.entropy == pytest.approx(float(rmt.matrix_entropy(values, max(shape))), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_power_law_is_the_one_that_weightwatcher_fits(seed):
    fits = pytest.importorskip("weightwatcher.WW_powerlaw")
    matrix = torch.distributions.StudentT(torch.tensor(2.5, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        values = singular_values(matrix.sample((300, 200)))
    found, theirs = fit_power_law(values), fits.WWFit((values**2).numpy())
    assert found.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert (found.x_min, found.ks) == pytest.approx((theirs.xmin, theirs.D), rel=1e-9)
    assert found.alpha_error == pytest.approx(theirs.sigma, rel=1e-9)
    assert found.tail == len(theirs.data)


def test_chances_are_those_of_tails_drawn_elsewhere():
    drawn = np.sort(np.random.default_rng(0).exponential(2.0, (4000, 100)), axis=1)
    above = drawn - drawn[:, :1]
    law = 1 - np.exp(-above / above.mean(1, keepdims=True))
    distances = np.abs(law - np.arange(100) / 100).max(1)
    for level in (0.5, 0.1, 0.02):
        critical = float(np.quantile(distances, 1 - level))
        found = chance_of_distance(critical, 100, 4000, 0, torch.device("cpu"))
        assert found == pytest.approx(level, rel=0.3)


def test_a_tail_that_is_no_power_law_is_found_out():
    steps = torch.linspace(0, 1, 200, dtype=torch.float64)
    law = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** (-0.5 / 1.5)
    assert fit_power_law(law).p_value > 0.1
    assert fit_power_law(law).alpha == pytest.approx(2.5, abs=0.25)
    two_heaps = torch.cat([1 + 1e-3 * steps, 2 + 1e-3 * steps])
    assert fit_power_law(two_heaps).p_value < 0.01


@pytest.mark.parametrize("shape", [(300, 200), (150, 600), (256, 256)])
def test_bulk_of_independent_entries_has_no_spikes(shape):
    values = torch.from_numpy(reference(draw(*shape, seed=5, dtype=torch.float64) * 0.02))
    found = fit_bulk(values, shape)
    assert found.sigma == pytest.approx(0.02, rel=0.02)
    assert found.edge == pytest.approx(0.02 * (math.sqrt(shape[0]) + math.sqrt(shape[1])), rel=0.02)
    assert found.spikes == 0


def test_spikes_are_what_was_planted():
    noise, shape = draw(300, 200, seed=6, dtype=torch.float64), (300, 200)
    left, right = (torch.linalg.qr(draw(side, 4, seed=side, dtype=torch.float64))[0] for side in shape)
    planted = noise + left * torch.tensor([60.0, 55, 50, 45]) @ right.mT
    assert spectrum(planted).marchenko_pastur.spikes == 4


def test_quantiles_and_the_upper_quantile_are_those_of_random_matrices():
    drawn = torch.linalg.svdvals(draw(100, 120, 80, seed=7, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0)[5:-5], quantiles(120, 80)[5:-5], rtol=0.02, atol=0)
    above = [float((drawn[:, 0] > upper_quantile(120, 80, t)).double().mean()) for t in (2.0234, -1.2686)]
    assert above == [pytest.approx(0.01, abs=0.04), pytest.approx(0.5, abs=0.15)]


def test_relative_norms_are_over_the_base(device):
    update, base = draw(20, 30, device=device), draw(20, 30, seed=1, device=device) * 10
    found = spectrum(update, base=base)
    expected = {"nuclear": "nuc", "frobenius": "fro", "spectral": 2}
    for name, order in expected.items():
        norms = [np.linalg.norm(matrix.cpu().numpy(), order) for matrix in (update, base)]
        assert found.relative[name] == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert spectrum(update, base=spectrum(base)).relative == pytest.approx(found.relative)
    assert math.isnan(spectrum(update, base=torch.zeros_like(base)).relative["spectral"])


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(4, 6), torch.zeros(0, 6), LowRank.zeros(4, 6), LowRank(torch.ones(4, 2), torch.zeros(2, 6))],
)
def test_nothing_has_rank_zero(matrix):
    found = spectrum(matrix)
    numbers = (found.rank, found.effective_rank, found.entropy, found.stable_rank, found.frobenius)
    assert numbers == (0, 0, 0, 0, 0)
    assert math.isnan(found.power_law.alpha)
    assert found.power_law.reason
    assert found.marchenko_pastur.spikes == 0


def test_everything_goes_into_json():
    found = spectrum(draw(30, 20), base=draw(30, 20, seed=1))
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert kept["energy_ranks"].keys() == {"0.5", "0.9", "0.95", "0.99"}
    assert len(kept["singular_values"]) == 20
    assert kept["relative"]["frobenius"] == pytest.approx(1, rel=0.2)
    assert json.dumps(spectrum(torch.zeros(2, 2)).to_dict(), allow_nan=False).count("null") >= 5


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (torch.randn(5), "update.matrix"),
        (torch.randn(2, 3, 4), "update.matrix"),
        (torch.ones(3, 3, dtype=torch.long), "int64"),
        (torch.full((3, 3), math.nan), "9 of 9 entries"),
        (LowRank(torch.tensor([[math.inf], [1.0]]), torch.ones(1, 2)), "1 of 2 entries"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, says):
    with pytest.raises(UpdateError, match=says):
        spectrum(matrix)


def test_a_base_of_another_shape_is_refused():
    with pytest.raises(UpdateError, match=r"\(3, 4\).*\(4, 3\)"):
        spectrum(torch.ones(3, 4), base=torch.ones(4, 3))


def test_same_bits_twice():
    assert spectrum(draw(60, 50)).to_dict() == spectrum(draw(60, 50)).to_dict()
