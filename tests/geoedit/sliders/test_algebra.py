"""Algebra of sliders and updates, against dense float64 arithmetic, numpy, scipy and peft."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from geoedit import EditError, LinearSteer, Site
from geoedit.algebra import average, commutator, compose, cross, difference, inverse
from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.calibration import Calibration
from manifolds import LowRank
from peft_analysis import WeightUpdate

SHAPES = {"mid.to_q": (12, 12, ()), "mid.to_k": (12, 20, ()), "down.conv": (10, 27, (3, 3))}


def slider(name: str, seed: int, *, rank: int = 3, modules: Any = tuple(SHAPES), **where: Any) -> Slider:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path in modules:
        rows, columns, kernel = SHAPES[path]
        left, right = (
            torch.randn(rows, rank, generator=generator),
            torch.randn(rank, columns, generator=generator),
        )
        changes[path] = ModuleChange(LowRank(left.to(**where), right.to(**where)), kernel)
    return Slider(name, {"unet": changes})


def dense(of: Slider | WeightUpdate) -> dict[str, Tensor]:
    if isinstance(of, WeightUpdate):
        return {name: of.dense(name).double() for name in of}
    return {f"{part}.{path}": change.matrix.dense().double() for part, path, change in of}


def close(found: Any, expected: Any, within: float = 1e-5) -> bool:
    return float((found - expected).norm()) <= within * max(float(expected.norm()), 1.0)


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_exact_composition_is_the_dense_sum(device: torch.device, dtype: torch.dtype) -> None:
    a, b = (slider(name, seed, device=device, dtype=dtype) for name, seed in (("a", 0), ("b", 1)))
    both = compose([a @ 1.5, b @ -0.7])
    for key, value in dense(both).items():
        expected = 1.5 * dense(a)[key] - 0.7 * dense(b)[key]
        assert close(value, expected, 3 * torch.finfo(dtype).eps)
    change = both.changes["unet"]["down.conv"]
    assert change.kernel == (3, 3) and change.matrix.rank == 6
    assert change.matrix.dtype == dtype and change.matrix.device.type == device.type
    assert both.name == "a @ 1.5 + b @ -0.7" and both.calibration is None
    assert both.details["terms"] == [{"slider": "a", "scale": 1.5}, {"slider": "b", "scale": -0.7}]


def test_a_truncated_composition_is_the_best_of_its_rank(device: torch.device) -> None:
    terms = [slider("a", 0, device=device) @ 1.5, slider("b", 1, rank=2, device=device) @ -0.7]
    exact = compose(terms)
    for rank in (None, 1, 4):
        cut = compose(terms, method="truncate", rank=rank)
        for key, value in dense(cut).items():
            u, s, v = np.linalg.svd(dense(exact)[key].cpu().numpy())
            kept = rank or 3
            best = torch.from_numpy((u[:, :kept] * s[:kept]) @ v[:kept])
            assert close(value.cpu(), best)
        assert {change.matrix.rank for _, _, change in cut} == {rank or 3}


def test_a_module_that_one_slider_changes_is_kept_and_zero_scales_are_zero() -> None:
    a, b = slider("a", 0), slider("b", 1, modules=["mid.to_k"])
    both = compose([a @ 2, b @ 1])
    assert set(dense(both)) == {f"unet.{path}" for path in SHAPES}
    assert close(dense(both)["unet.mid.to_q"], 2 * dense(a)["unet.mid.to_q"])
    for method in ("exact", "truncate", "orthogonalise"):
        nothing = compose([a @ 0, b @ 0], method=method)
        assert set(dense(nothing)) == set(dense(a)) and not any(v.any() for v in dense(nothing).values())
        assert all(change.matrix.rank for _, _, change in nothing)  # which files can hold
    assert close(dense(compose([a @ 0, b @ 1]))["unet.mid.to_k"], dense(b)["unet.mid.to_k"])


def test_scales_are_in_the_units_of_the_calibration() -> None:
    curve = Calibration("size", (-2.0, -1.0, 0.0, 1.0, 2.0), (-5.0, -2.0, 0.0, 1.0, 4.0))
    a = replace(slider("a", 0), calibration=curve)
    key = "unet.mid.to_q"
    assert close(dense(compose([a @ 2]))[key], 4 * dense(a)[key])
    assert close(dense(inverse(a @ -1))[key], 2 * dense(a)[key])


def test_what_is_taken_away_or_undone_leaves_zero() -> None:
    a, b = slider("a", 0), slider("b", 1)
    gone = compose([a @ 1.3, inverse(a @ 1.3)])
    assert all(close(value, torch.zeros_like(value)) for value in dense(gone).values())
    for key, value in dense(difference(a, b @ 2)).items():
        assert close(value, dense(a)[key] - 2 * dense(b)[key])
    update = a.update("unet")
    assert all(close(v, torch.zeros_like(v)) for v in dense(compose([update, inverse(update)])).values())


def test_weight_updates_are_composed_as_sliders_are(device: torch.device) -> None:
    a, b = slider("a", 0, device=device), slider("b", 1, device=device)
    both = compose([a.update("unet") * 1.5, b.update("unet")], method="truncate", rank=2)
    same = compose([a @ 1.5, b], method="truncate", rank=2)
    for _, path, change in same:
        assert close(both[f"{path}.weight"].dense(), change.matrix.dense())
    vector = WeightUpdate.from_tensors({"bias": torch.ones(3, device=device)})
    assert torch.equal(
        compose([vector, vector * 2], method="orthogonalise")["bias"], 3 * torch.ones(3).to(device)
    )


def test_a_truncated_composition_is_pefts_svd_merge() -> None:
    base = nn.ModuleDict({"layer": nn.Linear(20, 12, bias=False)})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    layer = model.get_submodule("base_model.model.layer")
    sliders = [
        Slider(
            n, {"model": {"layer": ModuleChange(LowRank(2 * layer.lora_B[n].weight, layer.lora_A[n].weight))}}
        )
        for n in "ab"
    ]
    model.requires_grad_(False)
    model.add_weighted_adapter(["a", "b"], [1.5, -0.7], "both", combination_type="svd")
    ours = compose([sliders[0] @ 1.5, sliders[1] @ -0.7], method="truncate")
    assert close(dense(ours)["model.layer"], layer.get_delta_weight("both").double())


# Orthogonalised


def test_orthogonalised_terms_share_no_space_and_keep_their_spectra(device: torch.device) -> None:
    terms = [slider(name, seed, device=device) for seed, name in enumerate("abc")]
    one, two = ([1.5, -0.7, 2.0], [0.0, 1.0, 0.0])
    key, alone = "unet.mid.to_k", []
    for chosen in np.eye(3):
        scaled = [term @ float(scale) for term, scale in zip(terms, chosen, strict=True)]
        alone.append(dense(compose(scaled, method="orthogonalise"))[key].cpu())
    for i, term in enumerate(terms):
        expected = np.linalg.svd(dense(term)[key].cpu().numpy(), compute_uv=False)
        assert np.allclose(np.linalg.svd(alone[i].numpy(), compute_uv=False), expected, atol=1e-4)
        for other in alone[:i]:
            tiny = 1e-5 * alone[i].norm() * other.norm()
            assert (alone[i] @ other.mT).norm() < tiny and (alone[i].mT @ other).norm() < tiny
    for scales in (one, two):  # linear in the factors, whatever the order
        order = [2, 0, 1]
        whole = compose([terms[i] @ scales[i] for i in order], method="orthogonalise")
        assert close(dense(whole)[key].cpu(), sum(s * part for s, part in zip(scales, alone, strict=True)))


def test_orthogonal_frames_are_the_nearest_ones() -> None:
    a, b = slider("a", 0, dtype=torch.float64), slider("b", 1, dtype=torch.float64)
    key = "unet.mid.to_q"
    frames = [np.linalg.svd(dense(s)[key].numpy()) for s in (a, b)]
    left = scipy.linalg.polar(np.hstack([u[:, :3] for u, _, _ in frames]))[0]
    right = scipy.linalg.polar(np.hstack([v[:3].T for _, _, v in frames]))[0]
    sizes = np.concatenate([s[:3] for _, s, _ in frames])
    found = dense(compose([a, b], method="orthogonalise"))[key]
    assert close(found, torch.from_numpy((left * sizes) @ right.T))


def test_what_cannot_be_orthogonalised_is_refused() -> None:
    a = slider("a", 0)
    with pytest.raises(EditError, match=r"unet\.mid\.to_q.*share a direction"):
        compose([a, a], method="orthogonalise")
    many = [slider(f"s{seed}", seed, modules=["mid.to_q"]) for seed in range(5)]
    with pytest.raises(EditError, match="rank=2"):
        compose(many, method="orthogonalise")
    compose(many, method="orthogonalise", rank=2)


def test_a_side_too_narrow_for_all_stays_and_the_other_one_is_orthogonalised() -> None:
    terms = [slider(f"s{seed}", seed, modules=["mid.to_k"]) for seed in range(5)]  # 12 × 20, ranks 15 in sum
    found = []
    for chosen in range(5):
        scaled = [term @ float(place == chosen) for place, term in enumerate(terms)]
        found.append(dense(compose(scaled, method="orthogonalise"))["unet.mid.to_k"])
        own = dense(terms[chosen])["unet.mid.to_k"]
        assert close(found[-1] @ found[-1].mT, own @ own.mT, 1e-4)  # writes as before
        assert all((found[-1] @ other.mT).norm() < 1e-4 * own.norm() ** 2 for other in found[:-1])


# Averages


def test_a_karcher_mean_is_that_of_its_manifold_and_partial_ones_are_refused() -> None:
    a = slider("a", 0, rank=1, modules=["mid.to_q"], dtype=torch.float64)
    key = "unet.mid.to_q"
    mean = average([a, a @ 1.2], [1, 3])  # along a ray of matrices of rank one the manifold is flat
    assert close(dense(mean)[key], 1.15 * dense(a)[key], 1e-9) and mean.name == "mean of a, a @ 1.2"
    parts = [slider(name, seed, rank=1, modules=["mid.to_q"]) for seed, name in enumerate("ab")]
    plain = average(parts, [1, 3], method="arithmetic")
    assert close(dense(plain)[key], (dense(parts[0])[key] + 3 * dense(parts[1])[key]) / 4)
    with pytest.raises(EditError, match=r"average: only some of the updates have.*mid\.to_k"):
        average([a, slider("b", 1, rank=1)])
    with pytest.raises(EditError, match="positive"):
        average(parts, [1, -1])


# Crossing


@pytest.mark.parametrize("gauge", ["nearest", "spectrum"])
def test_a_cross_depends_on_the_matrices_alone(gauge: Any, device: torch.device) -> None:
    a, b = slider("a", 0, device=device), slider("b", 1, device=device)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))[0].to(device)
    other = a.map(lambda m: LowRank(3 * m.left @ turn, turn.mT @ m.right / 3))
    found, same = cross(a, b, gauge=gauge), cross(other, b, gauge=gauge)
    for key, value in dense(found).items():
        assert close(value, dense(same)[key], 1e-4)
        writes, reads = dense(a)[key], dense(b)[key]
        outside = value - writes @ torch.linalg.pinv(writes) @ value
        assert outside.norm() < 1e-4 * value.norm()  # writes where a does
        outside = value - value @ torch.linalg.pinv(reads) @ reads
        assert outside.norm() < 1e-4 * value.norm()  # reads where b does
    assert all(close(v, dense(a)[k], 1e-4) for k, v in dense(cross(a, a, gauge=gauge)).items())
    scaled = cross(a @ -4, b @ 9, gauge=gauge)
    assert all(close(v, -6 * dense(found)[k], 1e-4) for k, v in dense(scaled).items())
    assert found.name == "a × b" and found.changes["unet"]["down.conv"].kernel == (3, 3)


def test_the_nearest_gauge_is_scipys_procrustes_of_the_balanced_factors() -> None:
    a, b = slider("a", 0, dtype=torch.float64), slider("b", 1, dtype=torch.float64)
    key = "unet.mid.to_k"
    stacks = []
    for of in (a, b):
        u, s, v = np.linalg.svd(dense(of)[key].numpy())
        stacks.append(np.vstack([u[:, :3] * np.sqrt(s[:3]), v[:3].T * np.sqrt(s[:3])]))
    turn, _ = scipy.linalg.orthogonal_procrustes(stacks[0], stacks[1])
    expected = stacks[0][:12] @ turn @ stacks[1][12:].T
    assert close(dense(cross(a, b))[key], torch.from_numpy(expected))


def test_components_that_are_small_leave_the_gauge_defined() -> None:
    small = torch.tensor([1.0, 0.1, 1e-4])
    a, b = (
        slider(name, seed).map(lambda m: LowRank(m.left * small, m.right)) for seed, name in enumerate("ab")
    )
    whole, cut = cross(a, b), cross(a, b, rank=2)
    for key, value in dense(whole).items():
        assert close(value, dense(cut)[key], 0.05 * float(value.norm()))  # and change little


def test_crossing_unequal_ranks_gives_the_smaller_and_undefined_gauges_are_refused() -> None:
    assert {c.matrix.rank for _, _, c in cross(slider("a", 0), slider("b", 1, rank=2))} == {2}
    assert {c.matrix.rank for _, _, c in cross(slider("a", 0), slider("b", 1), rank=1)} == {1}
    eye = torch.eye(8)
    apart = [
        Slider(n, {"unet": {"q": ModuleChange(LowRank(eye[:, i : i + 2], eye[i : i + 2]))}})
        for n, i in (("a", 0), ("b", 4))
    ]
    with pytest.raises(EditError, match="do not overlap"):
        cross(*apart)
    with pytest.raises(EditError, match='gauge="nearest"'):
        cross(*apart, gauge="spectrum")
    with pytest.raises(EditError, match="no module in common"):
        cross(slider("a", 0, modules=["mid.to_q"]), slider("b", 0, modules=["mid.to_k"]))


# Commutators


def test_commutators_are_those_of_dense_matrices(device: torch.device) -> None:
    a, b = slider("a", 0, device=device), slider("b", 1, device=device)
    found = commutator(a @ 2, b).modules
    A, B = 2 * dense(a)["unet.mid.to_q"], dense(b)["unet.mid.to_q"]
    assert found["unet.mid.to_q"].kind == "square"
    assert close(found["unet.mid.to_q"].parts["matrix"].dense(), A @ B - B @ A)
    A, B = 2 * dense(a)["unet.mid.to_k"], dense(b)["unet.mid.to_k"]
    zero = (
        torch.zeros(12, 12, dtype=A.dtype, device=device),
        torch.zeros(20, 20, dtype=A.dtype, device=device),
    )
    one, other = (torch.cat([torch.cat([zero[0], M], 1), torch.cat([M.mT, zero[1]], 1)]) for M in (A, B))
    whole = one @ other - other @ one
    parts = found["unet.mid.to_k"].parts
    assert close(parts["written"].dense(), whole[:12, :12]) and close(parts["read"].dense(), whole[12:, 12:])
    bound = math.sqrt(2) * float(one.norm() * other.norm())
    assert found["unet.mid.to_k"].bound == pytest.approx(bound, rel=1e-5)
    assert found["unet.mid.to_k"].size == pytest.approx(float(whole.norm()), rel=1e-5)
    assert commutator(a, a).share < 1e-6 and 0 < commutator(a, b).share < 1
    assert list(commutator(a, b).table["module"]) == [f"unet.{path}" for path in SHAPES]


def test_changes_with_singular_vectors_in_common_commute_as_dilations() -> None:
    u, v = (
        torch.linalg.qr(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)))[0] for n in (12, 20)
    )
    one, other = (LowRank(u * torch.tensor(values), v.mT) for values in ([3.0, 2.0, 1.0], [0.1, -5.0, 2.0]))
    found = commutator(*(WeightUpdate.from_tensors({"w": each}) for each in (one, other)))
    assert found.share < 1e-6


def test_edits_commute_or_not_as_the_model_shows(tiny_gpt2: Any) -> None:
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    one, other = (
        LinearSteer(
            Site(1, token="all"), torch.randn(32, generator=torch.Generator().manual_seed(s)), scale=3.0
        )
        for s in (0, 1)
    )
    assert commutator(one, other, model=tiny_gpt2, inputs=inputs).share.max() < 1e-4

    from dataclasses import dataclass

    from geoedit.edits import ActivationEdit

    @dataclass(frozen=True, eq=False, repr=False)
    class Halve(ActivationEdit):
        def change(self, states: Any, at: Any) -> Any:
            return states / 2

    found = commutator(one, Halve(Site(1, token="all")), model=tiny_gpt2, inputs=inputs)
    base = tiny_gpt2.transformer.h[1]

    def with_hook(change: Any) -> Tensor:
        hook = base.register_forward_hook(lambda m, a, out: _first(out, change))
        with torch.no_grad():
            logits = tiny_gpt2(**inputs).logits
        hook.remove()
        return logits

    vector = 3 * one.direction
    expected = with_hook(lambda x: x / 2 + vector) - with_hook(lambda x: (x + vector) / 2)
    assert close(found.difference, expected) and bool((found.share > 0.01).all())
    with pytest.raises(EditError, match="model="):
        commutator(one, other)


def _first(output: Any, change: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


# Refusals


@pytest.mark.parametrize(
    ("operands", "told"),
    [
        ([], "at least 1"),
        ([slider("a", 0) @ math.nan], "nan"),
        ([slider("a", 0), "b"], "'b' is a str"),
        (slider("a", 0), r"give \[a, b\]"),
        ([slider("a", 0), slider("a", 0).update("unet")], "together"),
        ([slider("a", 0).map(lambda m: LowRank(m.left * math.nan, m.right))], "NaN"),
    ],
)
def test_operands_that_do_not_go_are_refused(operands: Any, told: str) -> None:
    with pytest.raises(EditError, match=told):
        compose(operands)


def test_other_bases_and_shapes_are_named() -> None:
    a, b = slider("a", 0), slider("b", 1)
    bases = [{"base": {"unet": {"class": "UNet", "config": {"width": width}}}} for width in (320, 640)]
    with pytest.raises(EditError, match=r"another unet.*320.*640"):
        compose([replace(a, details=bases[0]), replace(b, details=bases[1])])
    kept = compose([replace(a, details=bases[0]), b])
    assert kept.details["base"] == bases[0]["base"]
    wide = Slider("wide", {"unet": {"mid.to_q": ModuleChange(LowRank(torch.ones(5, 1), torch.ones(1, 5)))}})
    with pytest.raises(EditError, match=r"unet\.mid\.to_q is \(12, 12\) in 'a', \(5, 5\) in 'wide'"):
        compose([a, wide])
    for wrong in (0, -1):
        with pytest.raises(EditError, match="rank"):
            compose([a, b], method="truncate", rank=wrong)
    with pytest.raises(EditError, match="truncate"):
        compose([a, b], rank=2)
    with pytest.raises(EditError, match="no method"):
        compose([a, b], method="sum")
