"""Intruders against the paper's definition by brute force in float64, and against peft's own scan."""

import pytest
import torch

import peft_analysis.rotated as rotated_module
from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import intruders
from peft_analysis.rotated import Rotated, rotated_matrix


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def problem(m, n, r, size, *, dtype=torch.float64, device="cpu", rank=None):
    """A base of spectral size about 2, and an update of about `size`."""
    W = normal(m, n, seed=1) / max(m, n) ** 0.5
    if rank is not None:
        W = normal(m, rank, seed=1) @ normal(rank, n, seed=2) / (m * n) ** 0.5 * 2
    B, A = normal(m, r, seed=3) / m**0.5, normal(r, n, seed=4) / n**0.5 * size
    return W.to(device, dtype), LowRank(B.to(device, dtype), A.to(device, dtype))


def brute(W, change, k):
    """Algorithm 1: singular values, and for both sides the cosines of tuned with all base vectors."""
    W, tuned = W.double().cpu(), (W.double() + change.double()).cpu()
    U0, _, V0 = torch.linalg.svd(W, full_matrices=False)
    U, S, V = torch.linalg.svd(tuned, full_matrices=False)
    return S[:k], (U[:, :k].T @ U0).abs(), (V[:k] @ V0.T).abs()


@pytest.fixture
def whole(monkeypatch):
    """Sizes of the dense decompositions of rotated matrices."""
    seen = []
    dense = rotated_module.dense_triplets

    def counting(rotated, k, p):
        seen.append(tuple(rotated.shape))
        return dense(rotated, k, p)

    monkeypatch.setattr(rotated_module, "dense_triplets", counting)
    return seen


SMALL = [(12, 12), (20, 9), (9, 20), (40, 3), (1, 7), (7, 1), (1, 1)]
LARGE = [(240, 240), (330, 200), (200, 330)]


@pytest.mark.parametrize(("m", "n"), SMALL + LARGE)
@pytest.mark.parametrize(("r", "size"), [(1, 0.05), (1, 8.0), (3, 2.0), (9, 1.0)])
def test_both_kinds_of_update_agree_with_the_definition(m, n, r, size, whole, device):
    W, update = problem(m, n, r, size, device=device)
    k = 10
    S, left, right = brute(W, update.dense(), k)
    base = BaseSVD.of(W)
    for change in (update, update.dense()):
        found = intruders(W, change, k=k, base_svd=base)
        torch.testing.assert_close(found.singular_values.cpu(), S, rtol=1e-9, atol=1e-12)
        for side, cosines in ((found.left, left), (found.right, right)):
            assert side.similarities.device == W.device
            torch.testing.assert_close(side.similarities.cpu(), cosines.amax(1), rtol=0, atol=1e-7)
            wanted = (cosines.amax(1) < 0.5).nonzero()[:, 0].tolist()
            assert side.indices.tolist() == wanted and side.count == len(wanted)
            best = cosines[torch.arange(len(S)), side.matches.cpu()]
            torch.testing.assert_close(best, cosines.amax(1), rtol=0, atol=1e-7)
    if (m, n) in LARGE:
        assert len(whole) == 1  # for the dense update


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_any_threshold(epsilon, device):
    W, update = problem(40, 30, 3, 1.5, device=device)
    _, left, right = brute(W, update.dense(), 10)
    found = intruders(W, update, epsilon)
    assert found.left.indices.tolist() == (left.amax(1) < epsilon).nonzero()[:, 0].tolist()
    assert found.right.indices.tolist() == (right.amax(1) < epsilon).nonzero()[:, 0].tolist()
    assert found.count == found.left.count and not found.left.ambiguous.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (210, 260)])
def test_lower_precision_stays_within_its_error(m, n, dtype, device):
    W, update = problem(m, n, 4, 2.0, dtype=dtype, device=device)
    found = intruders(W, update)
    exact = brute(W, LowRank(update.left.double(), update.right.double()).dense(), 10)
    for side, cosines in ((found.left, exact[1]), (found.right, exact[2])):
        assert side.similarities.dtype == torch.float32
        error = (side.similarities.cpu() - cosines.amax(1)).abs()
        assert bool((error <= side.errors.cpu()).all()) and float(error.max()) < 3e-4
        assert float(side.errors.max()) < 0.1


@pytest.mark.parametrize("k", [1, 5, 200, 1000])
def test_any_k(k, device):
    W, update = problem(260, 200, 3, 3.0, device=device)
    S, left, _ = brute(W, update.dense(), k)
    found = intruders(W, update, k=k, side="left")
    assert found.examined == min(k, 200) and found.right is None and found.k == k
    torch.testing.assert_close(found.singular_values.cpu(), S, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.similarities.cpu(), left.amax(1), rtol=0, atol=1e-6)


def test_values_that_are_rounding_have_no_vectors(device):
    for m, n in ((30, 24), (300, 240)):
        W, update = problem(m, n, 2, 1.0, device=device, rank=3)
        found = intruders(W, update)
        assert found.examined == 5 and len(found.similarities) == 5
        S = brute(W, update.dense(), 5)[0]
        torch.testing.assert_close(found.singular_values.cpu(), S, rtol=1e-9, atol=1e-12)
        inside = BaseSVD.of(W).U[:, :3].cpu().T @ torch.linalg.svd(
            (W + update.dense()).cpu(), full_matrices=False
        )[0][:, :5]  # fmt: skip
        assert bool((found.left.low.cpu() >= inside.abs().amax(0) - 1e-9).all())
        assert bool((found.left.low <= found.left.similarities).all())
        assert bool((found.left.similarities <= found.left.high + 1e-12).all())


def test_a_base_with_repeated_values_has_no_safe_answer(device):
    m = 16
    W = torch.eye(m, dtype=torch.float64, device=device)
    update = LowRank(normal(m, 1, seed=1, device=device), normal(1, m, seed=2, device=device))
    found = intruders(W, update, epsilon=0.5, k=1)
    assert found.left.high[0] == pytest.approx(1) and found.left.low[0] == pytest.approx(m**-0.5)
    assert found.left.ambiguous.tolist() == [True]
    spins = [torch.linalg.qr(normal(m, m, seed=seed, device=device))[0] for seed in range(3)]
    for spin in spins:  # another basis of the same space is another, equally good decomposition
        turned = intruders(W, update, k=1, base_svd=BaseSVD(spin, torch.ones_like(W[0]), spin, "0"))
        assert bool(turned.left.low <= turned.left.similarities) and turned.left.ambiguous.tolist() == [True]
        assert bool(turned.left.similarities <= turned.left.high + 1e-12)
    nothing = intruders(torch.diag(torch.arange(1.0, 6)).double(), torch.zeros(5, 5).double(), k=5)
    assert nothing.count == 0 and not nothing.left.ambiguous.any()


def test_an_update_of_nothing_and_a_base_of_nothing(device):
    W, update = problem(230, 220, 2, 1.0, device=device)
    for change in (update * 0.0, LowRank.zeros(230, 220, dtype=W.dtype, device=device), torch.zeros_like(W)):
        found = intruders(W, change)
        assert found.count == 0 and float(found.similarities.min()) > 1 - 1e-9
        assert found.matches.tolist() == list(range(10))
    assert intruders(torch.zeros_like(W), update).examined == 2
    assert intruders(torch.zeros_like(W), update * 0.0).examined == 0
    assert intruders(W, -1.0 * W).examined == 0


def test_a_huge_update_a_swap_and_a_tie(whole, device):
    """An iteration may miss a vector here: the count must send it to the dense route, or it is right."""
    W, _ = problem(240, 200, 1, 1.0, device=device)
    base = BaseSVD.of(W)
    u, v = base.U, base.V
    huge = LowRank(normal(240, 1, seed=5, device=device), 1e4 * normal(1, 200, seed=6, device=device))
    last = LowRank(3 * u[:, 150:155] * torch.arange(1.0, 6, device=device, dtype=W.dtype), v[:, 150:155].mT)
    tie = LowRank((base.S[0] - base.S[120]) * u[:, 120:121], v[:, 120:121].mT)
    gone = LowRank(-u[:, :40] * base.S[:40], v[:, :40].mT)
    for update in (huge, last, tie, gone):
        S, left, right = brute(W, update.dense(), 10)
        found = intruders(W, update, base_svd=base)
        torch.testing.assert_close(found.singular_values.cpu(), S, rtol=1e-8, atol=1e-12)
        sure = ~(found.left.errors > 1e-6).cpu()
        assert int(sure.sum()) == (8 if update is tie else 10)
        for side, cosines in ((found.left, left), (found.right, right)):
            assert float((side.similarities.cpu() - cosines.amax(1))[sure].abs().max()) < 1e-6
    tied = intruders(W, tie, base_svd=base)
    assert bool(tied.left.errors[:2].min() > 1) and bool(tied.left.ambiguous[:2].all())


@pytest.mark.parametrize(("m", "n"), [(60, 60), (70, 50)])
def test_the_count_is_that_of_the_singular_values(m, n, device):
    W, update = problem(m, n, 4, 3.0, device=device)
    base = BaseSVD.of(W)
    rotated = Rotated.of(base, update)
    dense = torch.linalg.svdvals(rotated_matrix(base, update)) / rotated.scale
    for level in torch.linspace(0.001, 1.1, 40).tolist():
        assert rotated.count(level**2) == int((dense > level).sum())


def test_exact_vectors_are_not_certified_while_a_larger_one_is_missing(device):
    W, _ = problem(240, 240, 1, 1.0, device=device)
    base = BaseSVD.of(W)
    hidden = LowRank(5 * base.U[:, 150:151], base.V[:, 150:151].mT)
    rotated = Rotated.of(base, hidden)
    squares = rotated.d[:15].square()
    vectors = torch.eye(240, 15, dtype=W.dtype, device=device)
    image = rotated.times(vectors)
    residual = rotated.back(image) - vectors * squares
    assert float(residual.norm()) < 1e-12
    assert rotated._certified(10, squares, vectors, image, residual) is None
    found = rotated.top(10)
    assert found is not None and float(found.values[0]) == pytest.approx(5 + float(base.S[150]))


@pytest.mark.parametrize("epsilon", [0.2, 0.5, 0.8])
def test_early_verdicts_are_the_final_ones(epsilon, device):
    for r, size in ((1, 0.5), (8, 1.0), (16, 6.0)):
        W, update = problem(300, 300, r, size, device=device)
        base = BaseSVD.of(W)
        early, final = (intruders(W, update, epsilon, base_svd=base, early=flag) for flag in (True, False))
        for one, other in ((early.left, final.left), (early.right, final.right)):
            assert one.indices.tolist() == other.indices.tolist()
            assert bool(((one.similarities - other.similarities).abs() <= one.errors).all())


def test_a_convolution_is_flattened_and_a_cache_is_used(device):
    W, update = problem(12, 18, 2, 4.0, device=device)
    cache = SVDCache()
    flat = intruders(W, update, cache=cache)
    shaped = intruders(W.reshape(12, 2, 3, 3), update.dense().reshape(12, 2, 3, 3), cache=cache)
    assert len(cache) == 1
    torch.testing.assert_close(flat.similarities, shaped.similarities)
    assert flat.to_dict()["left"]["count"] == flat.count


def test_what_makes_no_sense_is_refused():
    W, update = problem(6, 5, 1, 1.0)
    bad = W.clone()
    bad[2, 2] = torch.inf
    for call, message in [
        (lambda: intruders(W, update, 0.0), "epsilon"), (lambda: intruders(W, update, 1.5), "epsilon"),
        (lambda: intruders(W, update, epsilon=float("nan")), "epsilon"),
        (lambda: intruders(W, update, k=0), "k is 0"), (lambda: intruders(W.mT, update), "5, 6"),
        (lambda: intruders(bad, update), "NaN or infinite"), (lambda: intruders(W, bad), "NaN or infinite"),
        (lambda: intruders(W, LowRank(update.left * torch.nan, update.right)), "NaN"),
        (lambda: intruders(W, update, base_svd=BaseSVD.of(W.mT)), "base_svd"),
        (lambda: intruders(W[0], W[0]), "matrix"),
    ]:  # fmt: skip
        with pytest.raises(UpdateError, match=message):
            call()
