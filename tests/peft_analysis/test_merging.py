import itertools

import peft
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from torch import nn

from manifolds import FixedRank, LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.merging import karcher, karcher_mean, linear_merge_error, merge
from peft_analysis.updates import Weights, WeightUpdate

DENSE_METHODS = ("ties", "dare", "dare_ties")


def low(rows, columns, rank, seed, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )
    return LowRank(left.to(device, dtype), right.to(device, dtype))


def dense(*shape, seed, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def update(device="cpu", dtype=torch.float32, seed=0, **other):
    """A linear layer and a convolution of low rank, an embedding, a bias."""
    return WeightUpdate.from_tensors(
        {
            "linear.weight": low(12, 9, 2, seed, device, dtype),
            "embedding.weight": dense(7, 5, seed=seed + 100, device=device, dtype=dtype),
            "linear.bias": dense(12, seed=seed + 200, device=device, dtype=dtype),
            "conv.weight": dense(4, 3, 2, 2, seed=seed + 300, device=device, dtype=dtype),
            **other,
        }
    )


def as_dense(value):
    return (value.dense() if isinstance(value, LowRank) else value).double().cpu()


def test_updates_of_different_bases_are_refused():
    layers = [nn.Linear(6, 5) for _ in range(2)]
    bases = [
        Weights.of_module(layers[0]),
        Weights.of_module(layers[0].bfloat16()),
        Weights.of_module(layers[1]),
    ]
    a, b, c = (WeightUpdate.from_tensors({"weight": dense(5, 6, seed=1)}, base=base) for base in bases)
    assert len(merge([a, b])) == 1
    with pytest.raises(UpdateError, match="different bases: weight differs"):
        merge([a, c])


# Sums


@pytest.mark.parametrize("weights", [None, [1.0, -0.7], [2, 0], [0.0, 0.0]])
def test_exact_is_the_weighted_sum(device, weights):
    a, b = update(device, seed=1), update(device, seed=2)
    merged = merge([a, b], weights)
    assert list(merged) == list(a)
    for name in merged:
        one, two = weights or (1, 1)
        torch.testing.assert_close(
            as_dense(merged[name]), one * as_dense(a[name]) + two * as_dense(b[name]), atol=1e-5, rtol=1e-5
        )
        assert type(merged[name]) is type(a[name])
        assert merged[name].dtype == torch.float32 and merged[name].device == a[name].device


def test_low_rank_stays_low_rank_and_is_never_decomposed(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("a sum needs no decomposition"))
    merged = merge([update(seed=s) for s in range(3)], [1.0, 2.0, -3.0])["linear.weight"]
    assert isinstance(merged, LowRank) and merged.rank == 6


def test_svd_of_low_ranks_decomposes_only_the_core(monkeypatch, device):
    shapes, svd = [], torch.linalg.svd

    def watched(matrix, **options):
        shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    a, b = low(60, 50, 3, 1, device), low(60, 50, 3, 2, device)
    whole = as_dense(a) - 0.7 * as_dense(b)
    updates = [WeightUpdate.from_tensors({"w": value}) for value in (a, b)]
    monkeypatch.setattr(torch.linalg, "svd", watched)
    for rank, kept in ((None, 3), (1, 1), (5, 5), (6, 6), (9, 6)):
        found = merge(updates, [1.0, -0.7], method="svd", rank=rank)["w"]
        monkeypatch.setattr(torch.linalg, "svd", svd)
        left, values, right = torch.linalg.svd(whole)
        best = left[:, :kept] * values[:kept] @ right[:kept]
        torch.testing.assert_close(as_dense(found), best, atol=2e-5, rtol=1e-5)
        assert found.rank == kept
        monkeypatch.setattr(torch.linalg, "svd", watched)
    assert shapes and max(max(shape) for shape in shapes) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "repeated columns", "falling fast", "tiny", "zero"])
def test_svd_of_difficult_factors(device, dtype, kind):
    left, right = dense(40, 6, seed=1, dtype=torch.float64), dense(6, 30, seed=2, dtype=torch.float64)
    if kind == "repeated columns":
        left[:, 3:] = left[:, :3]
    elif kind == "falling fast":
        left = left * 10.0 ** -torch.arange(0, 18, 3)
    elif kind in ("tiny", "zero"):
        left, right = left * (1e-15 if kind == "tiny" else 0), right * 1e-15
    value = LowRank(left.to(device, dtype), right.to(device, dtype))
    found = merge([WeightUpdate.from_tensors({"w": value})], method="svd", rank=2)["w"]
    U, S, Vh = torch.linalg.svd(as_dense(value.to(torch.float64)), full_matrices=False)
    best = U[:, :2] * S[:2] @ Vh[:2]
    assert found.rank == 2 and found.dtype == dtype and found.device == value.device
    error = (as_dense(found.to(torch.float64)) - best).norm()
    assert float(error) <= 20 * torch.finfo(dtype).eps * float(S.norm())


def test_svd_of_dense_sums():
    a, b = update(seed=1), update(seed=2)
    whole = merge([a, b], method="svd")
    cut = merge([a, b], method="svd", rank=2)
    exact = merge([a, b])
    for name in ("linear.bias", "embedding.weight", "conv.weight"):
        torch.testing.assert_close(whole[name], exact[name])
    torch.testing.assert_close(cut["linear.bias"], exact["linear.bias"])
    assert cut.dense("conv.weight").shape == (4, 3, 2, 2)
    for name in ("embedding.weight", "conv.weight"):
        matrix = exact[name].flatten(1).double()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(
            as_dense(cut[name]), left[:, :2] * values[:2] @ right[:2], atol=1e-5, rtol=1e-5
        )


def test_mixed_forms_and_parameters_of_some_updates():
    a = update(seed=1, only_a=low(3, 3, 1, 5))
    b = WeightUpdate.from_tensors({"linear.weight": dense(12, 9, seed=3), "only_b": torch.ones(2)})
    merged = merge([a, b], [2.0, -1.0])
    assert set(merged) == set(a) | {"only_b"}
    expected = 2 * as_dense(a["linear.weight"]) - as_dense(b["linear.weight"])
    torch.testing.assert_close(as_dense(merged["linear.weight"]), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(merged["only_a"], LowRank)
    torch.testing.assert_close(as_dense(merged["only_a"]), 2 * as_dense(a["only_a"]))
    torch.testing.assert_close(merged["only_b"], -torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(device, dtype):
    one, tiny = torch.ones(3, 3), torch.full((3, 3), 1e-3)
    parts = [
        WeightUpdate.from_tensors({"w": part.to(device, dtype)}) for part in (one, tiny, tiny, tiny, -one)
    ]
    merged = merge(parts)["w"]
    assert merged.dtype == dtype
    torch.testing.assert_close(as_dense(merged), 3 * tiny.to(dtype).double(), rtol=1e-2, atol=0)
    mixed = merge([parts[0], WeightUpdate.from_tensors({"w": low(3, 3, 1, 0, device)})])["w"]
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv", "embedding"])
def test_exact_and_svd_agree_with_pefts_cat_and_svd(kind):
    from transformers.pytorch_utils import Conv1D

    layer = {
        "linear": nn.Linear(10, 8), "conv1d": Conv1D(8, 10), "conv": nn.Conv2d(3, 6, 3),
        "embedding": nn.Embedding(12, 8),
    }[kind]  # fmt: skip
    model = nn.ModuleDict({"layer": layer})
    base = layer.weight.detach().clone()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, fan_in_fan_out=kind == "conv1d"
    )
    wrapped = peft.get_peft_model(model, config, "a")
    wrapped.add_adapter("b", config)
    part = wrapped.base_model.model["layer"]
    deltas = {name: part.get_delta_weight(name).detach() for name in ("a", "b")}
    conv1d = kind == "conv1d"
    updates = []
    for name in ("a", "b"):
        if kind == "embedding":
            left, right = part.lora_embedding_B[name].detach(), part.lora_embedding_A[name].detach()
        else:
            left = part.lora_B[name].weight.detach().flatten(1)
            right = part.lora_A[name].weight.detach().flatten(1)
        value = LowRank(left * 3.0, right)
        value = value.mT if conv1d or kind == "embedding" else value
        weights = Weights.of_module(nn.ModuleDict({"layer": layer}))
        whole = Weights({"w": lambda: base}, shapes={"w": base.shape}, dtypes={"w": base.dtype}, layouts={})
        assert weights is not None
        updates.append(WeightUpdate.from_tensors({"w": value}, base=whole, details={"scaling": 3.0}))
        torch.testing.assert_close(updates[-1].dense("w"), deltas[name])
    for combination, method in (("cat", "exact"), ("svd", "svd")):
        wrapped.add_weighted_adapter(["a", "b"], [1.0, -0.5], combination, combination_type=combination)
        theirs = part.get_delta_weight(combination).detach()
        ours = merge(updates, [1.0, -0.5], method=method)
        torch.testing.assert_close(ours.dense("w"), theirs, atol=2e-5, rtol=1e-4)
    wrapped.add_weighted_adapter(["a", "b"], [1.0, -0.5], "linear", combination_type="linear")
    exact = merge(updates, [1.0, -0.5]).dense("w")
    error = (part.get_delta_weight("linear").detach() - exact).norm() / exact.norm()
    assert linear_merge_error(updates, [1.0, -0.5])["w"] == pytest.approx(float(error), rel=1e-4)


def test_error_of_pefts_linear_merge():
    a, b = low(300, 200, 8, 1), low(300, 200, 8, 2)
    one, two = (WeightUpdate.from_tensors({"w": value}) for value in (a, b))
    assert (
        0.8 < linear_merge_error([one, two])["w"] < 1.2
    )  # cross terms of two strangers are as large as both
    assert linear_merge_error([one])["w"] < 1e-6
    none = WeightUpdate.from_tensors({"w": LowRank.zeros(300, 200)})
    with pytest.raises(UpdateError, match=r"stored ranks \[8, 0\]"):
        linear_merge_error([one, none])
    with pytest.raises(UpdateError, match="dense in update 0"):
        linear_merge_error([update()])


def test_scalings_that_differ_change_the_linear_merge():
    factors = [(dense(6, 2, seed=s), dense(2, 5, seed=s + 9)) for s in (1, 2)]
    scalings = (0.5, 4.0)
    updates = [
        WeightUpdate.from_tensors({"w": LowRank(B * s, A)}, details={"scaling": s})
        for (B, A), s in zip(factors, scalings, strict=True)
    ]
    added = sum(B * s**0.5 for (B, _), s in zip(factors, scalings, strict=True)) @ sum(
        A * s**0.5 for (_, A), s in zip(factors, scalings, strict=True)
    )
    exact = sum(B @ A * s for (B, A), s in zip(factors, scalings, strict=True))
    error = float((added - exact).norm() / exact.norm())
    assert linear_merge_error(updates)["w"] == pytest.approx(error, rel=1e-4)


# Sparse


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_within_a_parameter_is_pefts(device, density, election):
    values = [dense(8, 6, seed=s, device=device) for s in range(3)]
    updates = [WeightUpdate.from_tensors({"w": value}) for value in values]
    ours = merge(updates, method="ties", density=density, election=election, scope="parameter")["w"]
    theirs = peft_ties(values, torch.ones(3, device=device), density, election)
    votes = sum(
        (v * (v.abs() >= v.abs().flatten().topk(int(density * 48)).values[-1])).sign() for v in values
    )
    drawn = (votes == 0) if election == "frequency" else torch.zeros_like(votes, dtype=torch.bool)
    torch.testing.assert_close(ours[~drawn], theirs[~drawn])
    assert not ours[drawn].any()  # peft gives a draw to the positive side


def test_ties_by_hand():
    a = torch.tensor([[4.0, -1.0, 3.0, 0.5]])
    b = torch.tensor([[-2.0, 5.0, 2.5, 0.1]])
    updates = [WeightUpdate.from_tensors({"w": value}) for value in (a, b)]
    # trimmed to halves: (4, 0, 3, 0) and (0, 5, 2.5, 0)
    assert merge(updates, method="ties", density=0.5)["w"].tolist() == [[4.0, 5.0, 2.75, 0.0]]
    # with weights 1 and -2: (4, 0, 3, 0) and (0, -10, -5, 0): the sign of the third is negative
    assert merge(updates, [1.0, -2.0], method="ties", density=0.5)["w"].tolist() == [[4.0, -10.0, -5.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_ranks_entries_over_the_whole_update(device, dtype):
    parts = {
        "small": dense(6, 5, seed=1).to(device, dtype) * 0.1,
        "large": dense(4, 5, seed=2).to(device, dtype),
    }
    parts |= {"low": low(5, 7, 2, 3, device, dtype), "bias": dense(9, seed=4).to(device, dtype)}
    one = WeightUpdate.from_tensors(parts)
    merged = merge([one], [3.0], method="ties", density=0.3)
    everything = torch.cat([as_dense(one[name]).flatten() for name in one])
    least = everything.abs().sort(descending=True).values[int(0.3 * len(everything)) - 1]
    for name in one:
        value = as_dense(one[name])
        torch.testing.assert_close(as_dense(merged[name]), 3 * value * (value.abs() >= least * (1 - 1e-12)))
    kept = sum(int((as_dense(merged[name]) != 0).sum()) for name in one)
    assert kept == int(0.3 * len(everything))
    assert not merged["small"].any() or int((merged["small"] != 0).sum()) < 9


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_draws_from_its_generator_and_keeps_the_mean(device, method):
    ones = WeightUpdate.from_tensors(
        {"a": torch.ones(200, 300, device=device), "b": torch.ones(500, device=device)}
    )

    def drawn(seed, order=("a", "b")):
        merged = merge([ones], method=method, density=0.25, generator=torch.Generator().manual_seed(seed))
        return {name: merged[name] for name in order}

    first, again, other = drawn(0), drawn(0, ("b", "a")), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a"], other["a"])
    assert set(first["a"].unique().tolist()) == {0.0, 4.0}
    assert abs(float(first["a"].mean()) - 1) < 5 * (3 / 60000) ** 0.5
    whole = merge([ones], [-0.5], method=method, density=1.0)
    assert torch.equal(whole["a"], torch.full_like(whole["a"], -0.5))


def test_dare_drops_independently_and_reads_the_same_twice():
    ones = WeightUpdate.from_tensors({"a": torch.ones(200, 200), "b": torch.ones(200, 200)})
    merged = merge([ones, ones], [1.0, -1.0], method="dare", density=0.5)
    assert torch.equal(merged["a"], merged["a"]) and not torch.equal(merged["a"], merged["b"])
    assert {-2.0, 0.0, 2.0} == set(merged["a"].unique().tolist())  # the two masks are not one


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_sparse_results_can_be_cut_to_a_rank(method):
    a, b = update(seed=1), update(seed=2)
    whole = merge([a, b], [1.0, -0.7], method=method, density=0.5)
    cut = merge([a, b], [1.0, -0.7], method=method, density=0.5, rank=2)
    for name in cut.matrices():
        left, values, right = torch.linalg.svd(whole[name].flatten(1), full_matrices=False)
        assert isinstance(cut[name], LowRank) and cut[name].rank == 2
        torch.testing.assert_close(
            as_dense(cut[name]), (left[:, :2] * values[:2] @ right[:2]).double(), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(cut["linear.bias"], whole["linear.bias"])


# On the manifold


def near(count, rows, columns, rank, seed=0, spread=0.05, device="cpu"):
    """Points of one rank around one, with singular values that are not small."""
    generator = torch.Generator().manual_seed(seed)
    manifold = FixedRank(rows, columns)
    u, v = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    centre = torch.cat([u, v]) * torch.linspace(1.5, 1.0, rank, dtype=torch.float64).sqrt()
    moves = [manifold.random_tangent(centre, generator=generator) * spread for _ in range(count)]
    return manifold, [manifold.to_lowrank(manifold.expmap(centre, move)).to(device) for move in moves]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0]])
def test_karcher_mean_of_two_is_on_their_geodesic(device, weights):
    manifold, points = near(2, 9, 7, 3, device=device)
    found = karcher_mean(points, weights)
    x, y = (manifold.from_lowrank(point) for point in points)
    between = manifold.expmap(x, manifold.logmap(x, y) * weights[1] / sum(weights))
    torch.testing.assert_close(found.mean.dense(), manifold.embedding(between), atol=1e-8, rtol=1e-8)
    assert found.converged and found.reason == "" and found.gradient <= 1e-8
    torch.testing.assert_close(found.distances.sum(), manifold.dist(x, y), rtol=1e-6, atol=0)


def test_karcher_mean_minimises_the_sum_of_squares():
    manifold, points = near(4, 8, 6, 2, seed=3, spread=0.1)
    weights = [0.4, 0.3, 0.2, 0.1]
    found = karcher_mean(points, weights)
    ends = torch.stack([manifold.from_lowrank(point) for point in points])

    weighted = torch.tensor(weights, dtype=torch.float64)

    def cost(x):
        return (manifold.dist2(x.unsqueeze(-3), ends) * weighted).sum(-1)

    x = manifold.from_lowrank(found.mean)
    flat = merge([WeightUpdate.from_tensors({"w": p}) for p in points], weights, method="svd", rank=2)["w"]
    moves = manifold.random_tangent(x.expand(8, -1, -1), generator=torch.Generator().manual_seed(1)) * 0.02
    others = torch.cat([manifold.expmap(x, moves), manifold.from_lowrank(flat)[None]])
    assert bool((cost(others) > cost(x)).all())


def test_karcher_mean_of_full_rank_is_the_arithmetic_mean():
    points = [
        LowRank.from_dense(torch.eye(4, dtype=torch.float64) + 0.1 * dense(4, 4, seed=s).double())
        for s in range(3)
    ]
    mean = sum(point.dense() for point in points) / 3
    torch.testing.assert_close(karcher_mean(points).mean.dense(), mean, atol=1e-8, rtol=1e-8)


def test_karcher_merge(device):
    _, points = near(3, 8, 6, 2, device=device)
    bias = [torch.full((4,), float(i), device=device) for i in range(3)]
    updates = [
        WeightUpdate.from_tensors({"w": p.to(torch.float32), "bias": b, "zero": LowRank.zeros(3, 3)})
        for p, b in zip(points, bias, strict=True)
    ]
    merged = merge(updates, [1, 1, 2], method="karcher")
    expected = karcher_mean([p.to(torch.float32) for p in points], [1, 1, 2]).mean
    torch.testing.assert_close(as_dense(merged["w"]), as_dense(expected), atol=1e-6, rtol=1e-6)
    assert merged["w"].rank == 2 and merged["w"].dtype == torch.float32
    torch.testing.assert_close(merged["bias"], torch.full((4,), 1.25, device=device))
    assert not merged["zero"].dense().any()


def test_karcher_says_when_there_is_no_mean(monkeypatch):
    monkeypatch.setattr(karcher, "SHOTS", 2)  # strangers are not found in 20 either, which takes seconds
    strangers = [low(8, 8, 3, s) for s in (1, 2)]
    with pytest.raises(UpdateError, match=r"w: no Karcher mean was found.*too far apart"):
        merge([WeightUpdate.from_tensors({"w": p}) for p in strangers], method="karcher")["w"]
    opposite = karcher_mean([strangers[0], strangers[0] * -1.0])
    assert not opposite.converged and "lower rank" in opposite.reason
    assert opposite.gradient != opposite.gradient and bool(opposite.distances.isnan().all())
    same = karcher_mean([strangers[0], strangers[0]])
    assert same.converged and same.iterations == 0
    torch.testing.assert_close(same.mean.dense(), strangers[0].dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("matrices", "options", "message"),
    [
        ([], {}, "no matrices"),
        ([low(3, 3, 1, 0), low(3, 4, 1, 0)], {}, "of one shape"),
        ([low(3, 3, 1, 0), low(3, 3, 2, 0)], {}, r"ranks \[1, 2\].*give rank="),
        ([low(3, 3, 1, 0)], {"rank": 2}, "give at most 1"),
        ([low(3, 3, 1, 0)], {"weights": [-1.0]}, "positive"),
        ([low(3, 3, 1, 0)], {"weights": [1.0, 1.0]}, "one for each"),
    ],
)
def test_karcher_refuses(matrices, options, message):
    with pytest.raises(UpdateError, match=message):
        karcher_mean(matrices, **options)


# Refusals, laziness


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0], {}, "1 weights for 2 updates"),
        ([1.0, float("nan")], {}, "have to be finite"),
        (None, {"rank": 2}, "rank belongs to the other methods"),
        (None, {"method": "svd", "rank": 0}, "rank is 0"),
        (None, {"method": "ties", "density": 0.0}, "density is 0.0"),
        (None, {"method": "ties", "density": 1.5}, "density is 1.5"),
        (None, {"method": "svd", "density": 0.5}, "density belongs to"),
        (None, {"method": "ties", "generator": torch.Generator()}, "generator belongs to"),
        ([1.0, -1.0], {"method": "karcher"}, "positive"),
    ],
)
def test_refusals(weights, options, message):
    with pytest.raises(UpdateError, match=message):
        merge([update(seed=1), update(seed=2)], weights, **options)


def test_what_does_not_fit_is_listed():
    a = WeightUpdate.from_tensors({f"layer.{i}": torch.ones(2, 3) for i in range(12)})
    b = WeightUpdate.from_tensors({f"layer.{i}": torch.ones(3, 2) for i in range(12)})
    with pytest.raises(UpdateError, match=r"layer\.0: \(2, 3\) in update 0.*\(3, 2\) in update 1.*4 more"):
        merge([a, b])
    with pytest.raises(UpdateError, match="nothing to merge"):
        merge([])
    with pytest.raises(UpdateError, match=r"only some of the updates have more"):
        merge([update(), update(more=torch.ones(2))], method="karcher")
    with pytest.raises(UpdateError, match=r"dense in update 0.*give rank="):
        merge([update(), update()], method="karcher")["embedding.weight"]


@pytest.mark.parametrize("method", ["exact", "svd", *DENSE_METHODS, "karcher"])
def test_nan_is_named_when_it_is_read(method):
    broken = torch.ones(3, 3)
    broken[1, 1] = float("nan")
    merged = merge([WeightUpdate.from_tensors({"good": torch.ones(3), "bad": broken})], method=method)
    with pytest.raises(UpdateError, match="bad holds NaN"):
        merged["bad"]


def test_weights_that_overflow_are_named():
    one = WeightUpdate.from_tensors({"w": low(4, 4, 1, 0)})
    with pytest.raises(UpdateError, match=r"w: the weighted factors overflow torch\.float32"):
        merge([one], [1e39], method="svd")["w"]


def test_one_matrix_at_a_time():
    reads, a = [], update(seed=1)
    for name, entry in a.entries.items():
        object.__setattr__(entry, "read", lambda name=name, read=entry.read: (reads.append(name), read())[1])
    for method, options in itertools.product(["exact", "svd", "dare", "karcher"], [{}]):
        merged = merge([a, a], method=method, **options)
        assert reads == []
        merged["linear.weight"]
        assert set(reads) == {"linear.weight"}
        reads.clear()


def test_facts_of_the_result():
    base = Weights({"w": lambda: torch.zeros(3, 4)}, shapes={"w": torch.Size((3, 4))},
                   dtypes={"w": torch.float32}, layouts={"w": "in_out"})  # fmt: skip
    a = WeightUpdate.from_tensors({"w": torch.ones(3, 4)}, rounded=torch.float16)
    b = WeightUpdate.from_tensors({"w": torch.ones(3, 4)}, base=base, rounded=torch.bfloat16)
    merged = merge([a, b], [1.0, -0.7])
    entry = merged.entries["w"]
    assert (entry.layout, entry.kind, entry.rounded, entry.shape) == (
        "in_out",
        "merge",
        torch.bfloat16,
        (3, 4),
    )
    assert entry.details == {"method": "exact", "weights": [1.0, -0.7]}
    assert merged.base is base and merged.matrix("w").shape == (4, 3)
    assert merge([a, b], method="svd", rank=1).entries["w"].rounded is None
