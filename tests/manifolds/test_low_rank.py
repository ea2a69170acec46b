"""`LowRank` against the dense matrix."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from manifolds.errors import ManifoldError
from manifolds.low_rank import LowRank

SIZES = [(6, 5, 3), (3, 5, 7), (4, 4, 4), (5, 3, 1), (1, 1, 1), (2, 9, 9)]


def factors(m: int, n: int, k: int, batch: tuple[int, ...] = (), dtype=torch.float64, seed=0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank.from_factors(
        torch.randn(*batch, m, k, dtype=dtype, generator=generator),
        torch.randn(*batch, k, n, dtype=dtype, generator=generator),
    )


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_spectrum_is_that_of_the_dense_matrix(size, batch, device):
    W = factors(*size, batch).to(device)
    m, n, k = size
    U, S, Vh = W.svd()
    expected = torch.linalg.svdvals(W.dense())[..., : min(m, n, k)]
    assert U.shape == (*batch, m, min(m, n, k)) and Vh.shape == (*batch, min(m, n, k), n)
    close(S, expected)
    close(W.singular_values(), expected)
    close(U * S.unsqueeze(-2) @ Vh, W.dense())
    close(U.mT @ U, torch.eye(U.shape[-1], dtype=U.dtype, device=device).expand(*batch, -1, -1))
    close(W.norm(), W.dense().norm(dim=(-2, -1)))
    best = torch.linalg.svd(W.dense(), full_matrices=False)
    close(W.truncate(1).dense(), best[0][..., :1] * best[1][..., None, :1] @ best[2][..., :1, :])
    assert (W.numerical_rank() == torch.linalg.matrix_rank(W.dense())).all()


def test_algebra_is_that_of_the_dense_matrix():
    A, B, C = factors(6, 5, 3, (2,)), factors(6, 5, 2, (2,), seed=1), factors(5, 4, 1, (2,), seed=2)
    a, b, c = A.dense(), B.dense(), C.dense()
    x, y = torch.randn(2, 5, 4, dtype=a.dtype), torch.randn(2, 3, 6, dtype=a.dtype)
    scale = torch.tensor([2.0, -3.0], dtype=a.dtype)
    for found, expected in [
        ((A + B).dense(), a + b), ((A - B).dense(), a - b), ((-A).dense(), -a), ((2 * A / 4).dense(), a / 2),
        ((A * scale).dense(), a * scale[:, None, None]), ((scale * A / scale).dense(), a),
        (A.T.dense(), a.mT), ((A @ C).dense(), a @ c), (A @ x, a @ x), (y @ A, y @ a), (A + b, a + b),
        (b - A, b - a), (A.inner(B), (a * b).sum((-2, -1))), (A.inner(b), (a * b).sum((-2, -1))),
        (sum([A, B]).dense(), a + b), (LowRank.sum([A, B, A]).dense(), 2 * a + b), (A[1].dense(), a[1]),
        (A[:, ].dense(), a), (LowRank.stack([A[0], B[1]]).dense(), torch.stack([a[0], b[1]])),
    ]:  # fmt: skip
        close(found, expected)
    assert (A @ C).rank == 1 and (A + B).rank == 5 and LowRank.sum([A, B, A]).rank == 5
    assert (A - A).recompress(1e-10).dense().abs().max() < 1e-12


def test_a_difference_keeps_its_digits():
    column, row = torch.randn(50, 1, dtype=torch.float64), torch.randn(1, 40, dtype=torch.float64)
    near = column * (1 + 2.0**-30)
    difference = LowRank(near, row) - LowRank(column, row)
    exact = (near - column).norm() * row.norm()
    assert abs(float(difference.norm() / exact) - 1) < 1e-6
    assert abs(float(difference.inner(difference).clamp(min=0).sqrt() / exact) - 1) > 1e-3


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-8])
def test_recompression_keeps_its_promise_with_the_least_rank(tolerance):
    values = 10.0 ** -torch.arange(8, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(2, size, 8, dtype=torch.float64))[0] for size in (20, 15))
    W = LowRank.from_svd(U, values.expand(2, 8), V.mT)
    kept = W.recompress(tolerance)
    error = (kept.dense() - W.dense()).norm(dim=(-2, -1)) / W.dense().norm(dim=(-2, -1))
    assert (error <= tolerance).all()
    assert (W.truncate(kept.rank - 1).dense() - W.dense())[0].norm() > tolerance * W.dense()[0].norm()
    again = LowRank.from_dense(W.dense(), tolerance=tolerance)
    assert again.rank == kept.rank
    close(again.dense(), kept.dense(), 1e-10)


def test_derivatives_where_singular_values_meet():
    U, V = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64))[0] for size in (6, 5))
    inputs = (U.requires_grad_(), V.mT.contiguous().requires_grad_())
    extra = LowRank(torch.randn(6, 1, dtype=U.dtype), 1e-2 * torch.randn(1, 5, dtype=U.dtype))
    for f in (
        lambda left, right: LowRank(left, right).norm(),
        lambda left, right: (LowRank(left, right) + extra).truncate(3).dense(),
        lambda left, right: (LowRank(left, right) + LowRank(left, right / 2)).truncate(3).dense(),
    ):
        assert gradcheck(f, inputs) and gradgradcheck(f, inputs)
    assert gradcheck(lambda left, right: LowRank(left, right).singular_values().sum(), inputs)


def test_second_derivative_of_distinct_singular_values():
    W = factors(6, 5, 3)
    inputs = (W.left.requires_grad_(), W.right.requires_grad_())
    assert gradgradcheck(lambda left, right: LowRank(left, right).singular_values(), inputs)


def test_an_adapter_at_its_start_has_gradients():
    B, A = torch.zeros(6, 3, requires_grad=True), torch.randn(3, 5)
    for value in (LowRank(B, A).norm(), LowRank(B, A).truncate(2).dense().sum()):
        (gradient,) = torch.autograd.grad(value, B)
        assert gradient.isfinite().all()


def test_transforms_and_compilation():
    W, single = factors(6, 5, 3, (4,)), factors(6, 5, 3)
    close(torch.func.vmap(lambda w: w.norm())(W), W.norm())
    close(torch.func.vmap(lambda w: w.truncate(2))(W).dense(), W.truncate(2).dense())
    gradient = torch.func.grad(lambda w: w.norm())(single)
    close(gradient.left, single.dense() @ single.right.mT / single.norm())
    for f in (
        lambda w: w.norm(),
        lambda w: w.singular_values(),
        lambda w: w.inner(w),
    ):
        close(torch.compile(f, fullgraph=True, backend="aot_eager")(single), f(single))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_dtype(dtype):
    W = factors(6, 5, 3).to(dtype)
    for value in (
        *W.svd(),
        W.norm(),
        W.singular_values(),
        W.truncate(2).left,
        W.column_space(),
        W.row_space(),
    ):
        assert value.dtype == dtype and value.isfinite().all()


def test_zero_and_empty():
    Z = LowRank.zeros(2, 4, 3)
    assert Z.norm().tolist() == [0, 0] and Z.singular_values().shape == (2, 0) and Z.recompress().rank == 0
    assert Z.numerical_rank().tolist() == [0, 0] and Z.dense().shape == (2, 4, 3)
    zero = LowRank.from_dense(torch.zeros(4, 3))
    assert zero.rank == 0 and zero.norm() == 0
    assert LowRank.from_factors(torch.zeros(4, 2), torch.zeros(2, 3)).numerical_rank() == 0


def test_files(tmp_path: Path, device):
    W = factors(6, 5, 3, (2,)).to(device)
    path = tmp_path / "update.safetensors"
    W.save(path, metadata={"layer": "3"})
    again = LowRank.load(path, device=device)
    assert torch.equal(again.left, W.left) and torch.equal(again.right, W.right)
    assert LowRank.metadata(path) == {"layer": "3"} and [p.name for p in tmp_path.iterdir()] == [path.name]
    W.T.save(path)
    assert torch.equal(LowRank.load(path, device=device).dense(), W.T.dense())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ManifoldError, match="whole safetensors file"):
        LowRank.load(path)
    with pytest.raises(ManifoldError, match="no file"):
        LowRank.load(tmp_path / "absent")


def test_bad_input_is_refused_with_words():
    left, right = torch.randn(4, 2), torch.randn(2, 3)
    W = LowRank(left, right)
    for call, words in [
        (lambda: LowRank(left, right.mT), "no product"),
        (lambda: LowRank(left.double(), right), "dtypes"),
        (lambda: LowRank(torch.zeros(2, 4, 2), torch.zeros(3, 2, 3)), "broadcast"),
        (lambda: LowRank(left * torch.nan, right).svd(), "not finite"),
        (lambda: W.truncate(-1), "rank is -1"),
        (lambda: W.recompress(-1.0), "tolerance"),
        (lambda: W + W.T, "differ"),
        (lambda: W @ W, "do not fit"),
        (lambda: LowRank.sum([]), "nothing to sum"),
        (lambda: W[0], "index"),
    ]:
        with pytest.raises(ManifoldError, match=words):
            call()
    assert LowRank(left * torch.nan, right).norm().isnan()
