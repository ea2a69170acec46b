import json
import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from manifolds import LowRank
from peft_analysis.compare import compare
from peft_analysis.errors import UpdateError
from peft_analysis.updates import Weights, WeightUpdate


def values(seed, device="cpu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    made = {
        "linear.weight": (torch.randn(30, 3, generator=draw), torch.randn(3, 20, generator=draw)),
        "conv.weight": torch.randn(8, 3, 3, 3, generator=draw),
        "bias": torch.randn(11, generator=draw),
    }
    return {
        name: LowRank(*(f.to(device, dtype) for f in v)) if isinstance(v, tuple) else v.to(device, dtype)
        for name, v in made.items()
    }


def dense(value):
    value = value.to(torch.float64)
    value = (value.dense() if isinstance(value, LowRank) else value).cpu()
    return value.flatten(1) if value.ndim > 1 else value


def top(matrix, k):
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return left[:, :k], right[:k].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_numpy_and_scipy(device, dtype):
    one, two = values(0, device, dtype), values(1, device, dtype)
    a, b = WeightUpdate.from_tensors(one), WeightUpdate.from_tensors(two)
    found = compare(a, b, top=4)
    wholes = [torch.cat([dense(v).flatten() for v in update.values()]) for update in (one, two)]
    for name, row in found.rows.items():
        A, B = dense(one[name]), dense(two[name])
        assert row.cosine == pytest.approx(float((A * B).sum() / A.norm() / B.norm()), abs=1e-5)
        assert row.norm_ratio == pytest.approx(float(B.norm() / A.norm()), rel=1e-4)
        assert row.sign_agreement == pytest.approx(float((A.sign() == B.sign()).double().mean()), abs=0.01)
        assert row.cosine_chance == pytest.approx(A.numel() ** -0.5)
        if A.ndim == 2:
            k = 3 if name == "linear.weight" else 4
            assert (row.rank_a, row.rank_b) == (k, k)
            for side, p, q in zip(("left", "right"), top(A, k), top(B, k), strict=True):
                angles = np.degrees(scipy.linalg.subspace_angles(p, q))
                np.testing.assert_allclose(getattr(row, f"angles_{side}"), angles, atol=0.02)
                overlap = np.linalg.norm(p.T @ q) ** 2 / k
                assert getattr(row, f"overlap_{side}") == pytest.approx(overlap, abs=1e-4)
                assert getattr(row, f"overlap_chance_{side}") == pytest.approx(k / len(p))
    cosine = float(wholes[0] @ wholes[1] / wholes[0].norm() / wholes[1].norm())
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert found.norm_a == pytest.approx(float(wholes[0].norm()), rel=1e-4)


def test_chance_is_what_strangers_have():
    draws = [compare(*(WeightUpdate.from_tensors(values(s)) for s in (2 * i, 2 * i + 1))) for i in range(40)]
    rows = [one.rows["linear.weight"] for one in draws]
    assert np.mean([row.overlap_left for row in rows]) == pytest.approx(rows[0].overlap_chance_left, rel=0.2)
    assert np.mean([row.overlap_right for row in rows]) == pytest.approx(
        rows[0].overlap_chance_right, rel=0.2
    )
    assert np.std([row.cosine for row in rows]) == pytest.approx(rows[0].cosine_chance, rel=0.4)


def test_an_update_and_itself_negated():
    a = WeightUpdate.from_tensors(values(3))
    found = compare(a, -2.0 * a)
    assert found.cosine == pytest.approx(-1, abs=1e-6) and found.norm_ratio == pytest.approx(2, rel=1e-5)
    row = found.rows["linear.weight"]
    assert row.sign_agreement == 0.0 and max(row.angles_left + row.angles_right) < 0.1
    assert row.overlap_left == pytest.approx(1, abs=1e-5)


def test_low_rank_against_dense_and_blocks_of_rows(monkeypatch):
    one, two = values(4), values(5)
    low = compare(WeightUpdate.from_tensors(one), WeightUpdate.from_tensors(two))
    monkeypatch.setattr(sys.modules["peft_analysis.compare"], "BLOCK", 50)
    full = {n: dense(v).float() for n, v in one.items()}
    full = WeightUpdate.from_tensors({**one, "linear.weight": full["linear.weight"]})
    mixed = compare(full, WeightUpdate.from_tensors(two), top=3)
    ours, theirs = low.rows["linear.weight"], mixed.rows["linear.weight"]
    assert theirs.sign_agreement == ours.sign_agreement
    assert theirs.cosine == pytest.approx(ours.cosine, abs=1e-6)
    np.testing.assert_allclose(theirs.angles_left, ours.angles_left, atol=0.01)


def test_sides_of_a_conv1d_are_out_and_in():
    value = LowRank(torch.eye(6)[:, :1], torch.eye(4)[:1])  # stored (in, out)
    other = LowRank(torch.eye(6)[:, :1], torch.eye(4)[1:2])
    base = Weights({"w": lambda: torch.zeros(6, 4)}, shapes={"w": torch.Size((6, 4))},
                   dtypes={"w": torch.float32}, layouts={"w": "in_out"})  # fmt: skip
    row = compare(*(WeightUpdate.from_tensors({"w": v}, base=base) for v in (value, other))).rows["w"]
    assert row.angles_left == pytest.approx((90.0,)) and row.angles_right == pytest.approx((0.0,), abs=0.05)


def test_zero_and_alone():
    a = WeightUpdate.from_tensors({"w": torch.zeros(3, 2), "a": torch.full((4,), 2.0)})
    b = WeightUpdate.from_tensors({"w": torch.ones(3, 2), "b": torch.ones(9)})
    found = compare(a, b)
    row = found.rows["w"]
    assert all(map(math.isnan, (row.cosine, row.norm_ratio, row.sign_agreement, row.overlap_left)))
    assert (row.rank_a, row.rank_b, row.angles_left) == (0, 1, ())
    assert (found.only_a, found.only_b, found.norm_a) == (("a",), ("b",), 4.0)
    assert found.norm_b == pytest.approx(15**0.5) and found.cosine == 0.0
    assert json.loads(json.dumps(found.to_dict()))["rows"]["w"]["cosine"] is None
    table = found.table
    assert list(table["parameter"]) == ["w"] and math.isnan(table["largest_angle_left"][0])


def test_a_number_is_compared_as_an_entry():
    """Such as the temperature of CLIP's logits: a parameter without dimensions."""
    a, b = (WeightUpdate.from_tensors({"logit_scale": torch.tensor(value)}) for value in (2.0, -1.0))
    row = compare(a, b).rows["logit_scale"]
    assert (row.shape, row.norm_ratio, row.cosine, row.sign_agreement) == ((), 0.5, -1.0, 0.0)


def test_refusals():
    a = WeightUpdate.from_tensors({"w": torch.ones(3, 2)})
    with pytest.raises(UpdateError, match=r"no parameter in common.*has w.*has v"):
        compare(a, WeightUpdate.from_tensors({"v": torch.ones(3, 2)}))
    with pytest.raises(UpdateError, match=r"w: \(3, 2\) and \(2, 3\)"):
        compare(a, WeightUpdate.from_tensors({"w": torch.ones(2, 3)}))
    with pytest.raises(UpdateError, match="w holds NaN"):
        compare(a, WeightUpdate.from_tensors({"w": torch.full((3, 2), math.nan)}))
    with pytest.raises(UpdateError, match="top is 0"):
        compare(a, a, top=0)
