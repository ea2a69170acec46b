"""What is kept of a base, and when it is computed again."""

import pytest
import torch

from peft_analysis.base_svd import BaseSVD, SVDCache, weight_key
from peft_analysis.errors import UpdateError


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture
def computed(monkeypatch):
    """Shapes that were decomposed."""
    seen = []
    svd = torch.linalg.svd

    def counting(matrix, **options):
        seen.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counting)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 4), (4, 1), (1, 1)])
def test_the_factors_give_the_matrix_back(shape, dtype, device):
    W = normal(*shape, dtype=dtype, device=device)
    found = BaseSVD.of(W)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.shape == shape and found.U.dtype == found.S.dtype == found.V.dtype == kept
    assert found.U.device == W.device
    torch.testing.assert_close(found.U * found.S @ found.V.mT, W.to(kept), rtol=1e-5, atol=1e-6)
    eye = torch.eye(min(shape), dtype=kept, device=device)
    torch.testing.assert_close(found.U.mT @ found.U, eye, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.V.mT @ found.V, eye, rtol=1e-5, atol=1e-6)


def test_rank_is_not_fooled_by_rounding_nor_by_a_large_value():
    low = normal(60, 3, seed=1) @ normal(3, 50, seed=2)
    assert BaseSVD.of(low).rank == 3
    assert BaseSVD.of(torch.diag(torch.tensor([1e4, 1.0, 0.1]))).rank == 3
    assert BaseSVD.of(torch.zeros(4, 3)).rank == 0


def test_a_weight_is_decomposed_once(computed, device):
    cache = SVDCache()
    W = normal(8, 6, device=device)
    first = cache(W)
    assert cache(W.clone()) is first and cache(W, key=weight_key(W)) is first and len(computed) == 1
    cache(W.mT)
    cache(W.double())
    changed = W.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], changed.new_tensor(9.0))
    cache(changed)
    assert len(computed) == 4 and len(cache) == 4


def test_a_folder_is_shared_by_caches(computed, tmp_path, device):
    W = normal(8, 6, device=device)
    first = SVDCache(tmp_path / "made")(W)
    second = SVDCache(tmp_path / "made")(W)
    assert len(computed) == 1 and second.U.device == W.device and second.key == first.key
    for one, other in ((first.U, second.U), (first.S, second.S), (first.V, second.V)):
        assert torch.equal(one, other)
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".safetensors"]


def test_the_least_recently_used_leaves_memory(computed):
    size = BaseSVD.of(normal(8, 6)).bytes
    computed.clear()
    cache = SVDCache(memory=2 * size)
    a, b, c = (normal(8, 6, seed=seed) for seed in range(3))
    for W in (a, b, a, c, a):
        cache(W)
    assert len(computed) == 3 and len(cache) == 2
    cache(b)
    assert len(computed) == 4
    assert len(SVDCache(memory=1)) == 0 and SVDCache(memory=1)(a).shape == (8, 6)


def test_broken_and_foreign_files_are_refused(tmp_path):
    W = normal(8, 6)
    SVDCache(tmp_path)(W)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(UpdateError, match="not a whole safetensors file"):
        SVDCache(tmp_path)(W)
    BaseSVD.of(normal(8, 6, seed=1)).save(path)
    with pytest.raises(UpdateError, match="of another weight"):
        SVDCache(tmp_path)(W)
    from safetensors.torch import save_file

    save_file({"left": W}, path)
    with pytest.raises(UpdateError, match="left"):
        SVDCache(tmp_path)(W)
    with pytest.raises(UpdateError, match="missing"):
        BaseSVD.load(tmp_path / "missing.safetensors")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import peft_analysis.base_svd as module

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        SVDCache(tmp_path)(normal(8, 6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((3, 2), torch.nan), "6 entries that are NaN"), (torch.zeros(0, 3), "no entries"),
        (torch.tensor([[1.0, torch.inf]]), "1 entries"),
    ],
)  # fmt: skip
def test_what_has_no_decomposition_is_refused(bad, message):
    with pytest.raises(UpdateError, match=message):
        SVDCache()(bad)


def test_a_key_is_no_path():
    with pytest.raises(UpdateError, match="weight_key"):
        SVDCache()(normal(3, 3), key="../../elsewhere")
