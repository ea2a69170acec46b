"""Edits along manifolds: against rotations by hand, on real small models, and never silent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

import manifolds
from geoedit import collect, testbeds
from geoedit.edits import ActivationEdit, GeodesicSteer, LinearSteer, Patch, Selected, TangentSteer
from geoedit.errors import EditError
from geoedit.site import Site
from geoedit.tokens import spellings
from manifolds.cloud.learned import LearnedManifold, Projection
from manifolds.errors import NoPathError

WIDTH = 32
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
RADIUS = 2.0
SITE = Site(1)


def draw(*shape: int, seed: int = 1, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, W = draw(WIDTH), draw(WIDTH, seed=2)


class Ring(LearnedManifold, kind="test-ring"):
    """A circle in a plane, in closed form: what a learned manifold gives, without samples."""

    dim, noise, reach = 1, 0.0, RADIUS

    def __init__(self, frame: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.frame, self.centre, self.width, self.name = frame, centre, len(frame), "Ring"
        self.looks = 0

    def angle(self, x: Tensor) -> Tensor:
        first, second = ((x - self.centre) @ self.frame).unbind(-1)
        return torch.atan2(second, first)

    def at(self, angle: Tensor) -> Tensor:
        return self.centre + RADIUS * torch.stack([angle.cos(), angle.sin()], -1) @ self.frame.mT

    def project(self, x: Tensor) -> Projection:
        self.looks += 1
        angle = self.angle(x)
        foot = self.at(angle)
        tangent = torch.stack([-angle.sin(), angle.cos()], -1) @ self.frame.mT
        distance = torch.linalg.vector_norm(x - foot, dim=-1)
        return Projection(foot, tangent[..., None], distance, distance < RADIUS)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        angle = self.angle(x)
        tangent = torch.stack([-angle.sin(), angle.cos()], -1) @ self.frame.mT
        return self.at(angle + (u * tangent).sum(-1) / RADIUS)

    def geodesic(self, x: Tensor, y: Tensor, points: int = 17) -> Tensor:
        start = self.angle(x)
        way = torch.remainder(self.angle(y) - start + math.pi, 2 * math.pi) - math.pi
        shares = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
        return self.at(start[..., None] + way[..., None] * shares)

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"frame": self.frame, "centre": self.centre}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ring:
        return cls(tensors["frame"], tensors["centre"])


def ring(seed: int = 5, width: int = WIDTH) -> Ring:
    frame = torch.linalg.qr(draw(width, 2, seed=seed).double()).Q
    return Ring(frame.float(), draw(width, seed=seed + 1, scale=0.1))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def read(model: nn.Module, block: int = 1, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    """The output of a block, through a plain torch hook."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks_of(model)[block].register_forward_hook(keep)
    with torch.no_grad():
        model(ids.to(next(model.parameters()).device), **inputs)
    handle.remove()
    return kept[0]


def read_edited(model: nn.Module, edit: object, **inputs: Any) -> Tensor:
    with edit.on(model):  # its hook stands before the one that reads
        return read(model, **inputs)


def turned(x: Tensor, plane: tuple[Tensor, Tensor], angle: Tensor | float) -> Tensor:
    """A vector rotated by an angle from one orthonormal vector toward the other, the rest of it held."""
    one, two = plane
    first, second = (x * one).sum(-1, keepdim=True), (x * two).sum(-1, keepdim=True)
    angle = torch.as_tensor(angle, dtype=x.dtype).reshape(-1, 1)
    rest = x - first * one - second * two
    cosine, sine = angle.cos(), angle.sin()
    return rest + (first * cosine - second * sine) * one + (first * sine + second * cosine) * two


# Closed forms.


def on_the_sphere(x: Tensor, v: Tensor, angle: Callable[[Tensor], Tensor]) -> Tensor:
    """x moved with its foot on the unit sphere, by an angle that may depend on the tangent part's length."""
    foot = x / x.norm(dim=-1, keepdim=True)
    tangent = v - (v * foot).sum(-1, keepdim=True) * foot
    size = tangent.norm(dim=-1, keepdim=True)
    return turned(foot, (foot, tangent / size), angle(size[:, 0])) + x - foot


SPHERE = manifolds.Sphere()
BY_HAND = {
    "tangent": (TangentSteer(SITE, SPHERE, V, scale=0.2), lambda size: (0.2 * size).atan()),
    "tangent, back": (TangentSteer(SITE, SPHERE, V, scale=-0.2), lambda size: (-0.2 * size).atan()),
    "geodesic": (GeodesicSteer(SITE, SPHERE, direction=V, scale=0.1), lambda size: 0.1 * size),
    "length": (
        GeodesicSteer(SITE, SPHERE, direction=V, length=0.5, scale=2.0),
        lambda size: torch.full_like(size, 1.0),
    ),
    "rows": (
        GeodesicSteer(SITE, SPHERE, direction=V, length=1.0, scale=torch.tensor([0.3, 1.0, -2.0])),
        lambda size: torch.tensor([0.3, 1.0, -2.0]).to(size),
    ),
    "geoopt": (GeodesicSteer(SITE, geoopt.Sphere(), direction=V, scale=0.1), lambda size: 0.1 * size),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_on_the_sphere_states_turn_by_the_angle_by_hand(name, shared_model, device) -> None:
    edit, angle = BY_HAND[name]
    model = shared_model.to(device)
    before, after = read(model), read_edited(model, edit)
    expected = on_the_sphere(before[:, -1].double(), V.double().to(device), angle).float()
    torch.testing.assert_close(after[:, -1], expected, rtol=0, atol=1e-5)
    assert torch.equal(after[:, :-1], before[:, :-1])  # the other tokens, to the bit


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5, -0.5])
def test_to_a_target_on_the_sphere_against_a_rotation(scale, shared_gpt2) -> None:
    before = read(shared_gpt2)[:, -1].double()
    foot, end = before / before.norm(dim=-1, keepdim=True), (W / W.norm()).double()
    angle = (foot @ end).acos()
    normal = end - (foot @ end)[:, None] * foot
    plane = (foot, normal / normal.norm(dim=-1, keepdim=True))
    for residual, rest in (("keep", before - foot), ("drop", 0 * before)):
        edit = GeodesicSteer(SITE, SPHERE, 3 * W, scale=scale, residual=residual)
        expected = turned(foot, plane, scale * angle) + rest
        after = read_edited(shared_gpt2, edit)[:, -1].double()
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


def test_each_row_has_its_own_target(shared_gpt2) -> None:
    targets = draw(3, WIDTH, seed=8)
    edit = GeodesicSteer(Site(1, token="all"), SPHERE, targets, residual="drop")
    after = read_edited(shared_gpt2, edit)
    expected = targets / targets.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(after, expected[:, None].expand_as(after), rtol=0, atol=1e-6)
    direction = GeodesicSteer(SITE, SPHERE, direction=targets, scale=0.1)
    one = GeodesicSteer(SITE, SPHERE, direction=targets[1], scale=0.1)
    assert torch.equal(read_edited(shared_gpt2, direction)[1], read_edited(shared_gpt2, one)[1])
    with pytest.raises(EditError, match="2 rows, but the batch has 3"):
        read_edited(shared_gpt2, GeodesicSteer(SITE, SPHERE, targets[:2]))


@pytest.mark.parametrize("name", ["tangent", "target", "part", "past", "before", "rows", "direction"])
def test_on_a_circle_in_a_plane_states_turn_about_its_centre(name, shared_gpt2, device) -> None:
    """Every state turns in the plane by the angle of its foot; what is normal to the circle stays."""
    model, circle = shared_gpt2.to(device), ring()
    centre, frame = circle.centre.double(), circle.frame.double()
    plane = (frame[:, 0], frame[:, 1])
    before = read(model).cpu()[:, -1].double()
    angles = torch.atan2(*((before - centre) @ frame).unbind(-1)[::-1])
    tangent = (-angles.sin())[:, None] * plane[0] + angles.cos()[:, None] * plane[1]
    along = tangent @ V.double()
    goal = torch.atan2(*((W.double() - centre) @ frame).unbind(-1)[::-1])
    way = torch.remainder(goal - angles + math.pi, 2 * math.pi) - math.pi
    rows = torch.tensor([0.5, 1.0, 1.25])
    edit, by = {
        "tangent": (TangentSteer(SITE, circle, V, scale=0.3), (0.3 * along / RADIUS).atan()),
        "target": (GeodesicSteer(SITE, circle, W), way),
        "part": (GeodesicSteer(SITE, circle, W, scale=0.3), 0.3 * way),
        "past": (GeodesicSteer(SITE, circle, W, scale=1.2), 1.2 * way),
        "before": (GeodesicSteer(SITE, circle, W, scale=-0.4), -0.4 * way),
        "rows": (GeodesicSteer(SITE, circle, W, scale=rows), rows * way),
        "direction": (GeodesicSteer(SITE, circle, direction=V, scale=0.3), 0.3 * along / RADIUS),
    }[name]
    foot = centre + RADIUS * (angles.cos()[:, None] * plane[0] + angles.sin()[:, None] * plane[1])
    expected = centre + turned(foot - centre, plane, by) + (before - foot)
    after = read_edited(model, edit).cpu()[:, -1].double()
    # Past the ends of a path its velocity comes from its last five points.
    loose = name in ("past", "before", "rows")
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-3 if loose else 1e-5)


def test_many_small_steps_follow_the_flow_of_the_projected_direction(shared_gpt2) -> None:
    """On a circle that is θ' = −c sin(θ − φ), which ends where the direction points away from the centre."""
    circle = ring()
    before = read(shared_gpt2)[:, -1]
    after = read_edited(shared_gpt2, TangentSteer(SITE, circle, V, scale=20.0, steps=200, residual="drop"))
    goal = circle.angle(circle.centre + V)
    torch.testing.assert_close(circle.angle(after[:, -1]), goal.expand(3), rtol=0, atol=1e-4)
    angle, size = circle.angle(before[:, -1:] if before.dim() == 3 else before), (V @ circle.frame).norm()
    exact = goal + 2 * ((angle - goal) / 2).tan().mul((-0.1 * size / RADIUS).exp()).atan()
    some = read_edited(shared_gpt2, TangentSteer(SITE, circle, V, scale=0.1, steps=100, residual="drop"))
    torch.testing.assert_close(circle.angle(some[:, -1]).cos(), exact.cos(), rtol=0, atol=2e-3)


def test_in_flat_space_both_are_the_linear_edit(shared_gpt2) -> None:
    flat = manifolds.Euclidean()
    linear = read_edited(shared_gpt2, LinearSteer(SITE, V, scale=0.5))
    for edit in (TangentSteer(SITE, flat, V, scale=0.5), GeodesicSteer(SITE, flat, direction=V, scale=0.5)):
        torch.testing.assert_close(read_edited(shared_gpt2, edit), linear, rtol=0, atol=1e-6)
    patched = read_edited(shared_gpt2, Patch(SITE, V, scale=0.5))
    torch.testing.assert_close(read_edited(shared_gpt2, GeodesicSteer(SITE, flat, V, scale=0.5)), patched)


@pytest.mark.parametrize("manifold", [geoopt.Euclidean(ndim=1), geoopt.PoincareBall(), geoopt.Lorentz()])
def test_manifolds_of_geoopt(manifold, shared_gpt2) -> None:
    states = read(shared_gpt2)[:, -1]
    feet = manifold.projx(states)
    expected = manifold.retr(feet, 0.1 * manifold.proju(feet, V.expand_as(feet))) + states - feet
    after = read_edited(shared_gpt2, TangentSteer(SITE, manifold, V, scale=0.1))[:, -1]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    after = read_edited(shared_gpt2, GeodesicSteer(SITE, manifold, V, residual="drop"))[:, -1]
    torch.testing.assert_close(after, manifold.projx(V).expand_as(after), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("learned", ["path", "cloud"])
def test_on_a_circle_that_was_learned(learned, shared_gpt2) -> None:
    """What was fitted to samples of the ring does what the ring does in closed form."""
    circle = ring()
    count = 240
    points = circle.at(torch.arange(count) * (2 * math.pi / count))
    if learned == "path":
        found: LearnedManifold = manifolds.PathCloud.fit(points, torch.arange(count) // 10)
        circle.centre = points.reshape(24, 10, -1).mean(1).mean(0)
        radius = float((points.reshape(24, 10, -1).mean(1) - circle.centre).norm(dim=1).mean())
    else:
        found, radius = manifolds.PointCloud.fit(points, dim=1, neighbors=12), RADIUS
    states = read(shared_gpt2)[:, -1]
    torch.testing.assert_close(found.distance(states), circle.distance(states), rtol=1e-2, atol=1e-2)
    for make in (
        lambda m, part: TangentSteer(SITE, m, V, scale=0.2 * part, residual="drop"),
        lambda m, part: GeodesicSteer(SITE, m, W, scale=0.3, residual="drop"),
        lambda m, part: GeodesicSteer(SITE, m, W, scale=torch.tensor([0.5, 1.1, -0.2]), residual="drop"),
        lambda m, part: GeodesicSteer(SITE, m, direction=V, length=part, residual="drop"),
    ):
        exact = circle.angle(read_edited(shared_gpt2, make(circle, 1.0))[:, -1])
        angle = circle.angle(read_edited(shared_gpt2, make(found, radius / RADIUS))[:, -1])
        turn = torch.remainder(angle - exact + math.pi, 2 * math.pi) - math.pi
        torch.testing.assert_close(turn, torch.zeros(3), rtol=0, atol=1e-2)


def test_the_almanac_says_what_the_target_says() -> None:
    """Sentences about March, their states moved along the months to June, are answered as if about June."""
    model, tokenizer, world = testbeds.load("almanac-gpt2")
    months = world.concepts["months"]
    prompts = months.prompts()
    site = Site(2, token="value")
    acts = collect(model, tokenizer, prompts, site)
    path = manifolds.PathCloud.fit(acts[site], torch.tensor([months.index(p.value) for p in prompts]))
    ids = spellings(tokenizer, months.values)
    march, june = ([p for p in prompts if p.value == month] for month in ("March", "June"))
    said = {}
    for residual in ("keep", "drop"):
        edit = GeodesicSteer.to_value(
            acts, "June", site=site, manifold=path, value_ids=ids, residual=residual
        )
        assert edit.fingerprint is not None
        inputs = tokenizer([p.text for p in march], return_tensors="pt", padding=True)
        last = inputs.attention_mask.sum(1) - 1
        with torch.no_grad(), edit.on(model):
            logits = model(**inputs).logits
        said[residual] = logits[torch.arange(len(march)), last].argmax(-1).tolist()
    assert said["keep"] == said["drop"] == [p.answer_ids(tokenizer)[0] for p in june]


# The edits as edits.


def test_removal_restores_every_bit(shared_model) -> None:
    plain, weights = shared_model(IDS).logits, copy.deepcopy(shared_model.state_dict())
    edit = TangentSteer(SITE, ring(), V) + GeodesicSteer(Site(2), SPHERE, W)
    with edit.on(shared_model):
        assert not torch.equal(shared_model(IDS).logits, plain)
    assert torch.equal(shared_model(IDS).logits, plain)
    assert all(torch.equal(weights[name], each) for name, each in shared_model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_rounded_once(dtype, tiny_gpt2, device) -> None:
    """The states are widened, moved on the manifold, and rounded; the manifold follows them."""
    model, circle = tiny_gpt2.to(device=device, dtype=dtype), ring()
    wide = torch.promote_types(dtype, torch.float32)
    moved = Ring(circle.frame.to(device, wide), circle.centre.to(device, wide))
    before = read(model)[:, -1].to(wide)
    for edit in (TangentSteer(SITE, circle, V, scale=0.3), GeodesicSteer(SITE, circle, W)):
        after = read_edited(model, edit)[:, -1]
        assert after.dtype == dtype
        found = moved.project(before)
        ends = moved.geodesic(found.foot, moved.projx(W.to(before)).expand_as(before))[:, -1]
        if isinstance(edit, TangentSteer):
            along = (V.to(before) * found.tangent[..., 0]).sum(-1, keepdim=True) * found.tangent[..., 0]
            ends = moved.retr(found.foot, 0.3 * along)
        close = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(after.to(wide), before + ends - found.foot, rtol=close, atol=close)


def test_the_manifold_is_asked_once_for_all_states_of_a_pass(shared_gpt2) -> None:
    circle = ring()
    with TangentSteer(Site(1, token="all"), circle, V).on(shared_gpt2):
        shared_gpt2(IDS)
    assert circle.looks == 2  # the feet, and the retraction


def test_tokens_in_padded_prompts(shared_gpt2) -> None:
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    before = read(shared_gpt2, attention_mask=real)
    circle = ring()
    for token, chosen in (
        ("all", real.bool()),
        (1, torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()),
        (lambda ids, real: ids % 10 == 3, IDS % 10 == 3),
    ):
        after = read_edited(
            shared_gpt2, GeodesicSteer(Site(1, token=token), circle, W, residual="drop"), attention_mask=real
        )
        expected = torch.where(chosen[..., None], circle.projx(W), before)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
        assert torch.equal(after[~chosen], before[~chosen])


def test_scales_compositions_and_copies(shared_gpt2) -> None:
    circle = ring()
    edit = TangentSteer(SITE, circle, V, scale=0.2)
    expected = read_edited(shared_gpt2, edit)
    assert torch.equal(read_edited(shared_gpt2, edit.with_scale(0.1).with_scale(0.2)), expected)
    assert torch.equal(read_edited(shared_gpt2, copy.deepcopy(edit)), expected)
    both = edit + LinearSteer(SITE, W)
    torch.testing.assert_close(read_edited(shared_gpt2, both)[:, -1], expected[:, -1] + W)
    with edit.on(shared_gpt2):
        again = copy.deepcopy(shared_gpt2)
        assert torch.equal(read(again), expected)
        shared_gpt2(IDS)
    marked = edit.for_model(shared_gpt2)
    assert torch.equal(read_edited(shared_gpt2, marked), expected)


def test_a_row_of_scale_zero_stays_to_the_bit(shared_gpt2) -> None:
    before = read(shared_gpt2)
    scales = torch.tensor([0.0, 1.0, 0.0])
    for edit in (TangentSteer(SITE, ring(), V, scale=scales), GeodesicSteer(SITE, ring(), W, scale=scales)):
        after = read_edited(shared_gpt2, edit)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


def test_states_outside_of_the_samples_can_be_left(shared_gpt2) -> None:
    circle = ring()
    before = read(shared_gpt2)
    distance = circle.project(before).distance
    inside = distance < distance.median()
    circle.project = lambda x: Projection(  # type: ignore[method-assign]
        *((found := Ring.project(circle, x)).foot, found.tangent, found.distance),
        found.distance < distance.median(),
    )
    site = Site(1, token="all")
    after = read_edited(shared_gpt2, TangentSteer(site, circle, V, outside="leave"))
    every = read_edited(shared_gpt2, TangentSteer(site, circle, V))
    assert torch.equal(after, torch.where(inside[..., None], every, before))
    assert 0 < int(inside.sum()) < inside.numel()


# Under `generate`.

PROMPTS = torch.tensor([[11, 12, 13, 14, 15], [0, 0, 21, 22, 23], [0, 0, 0, 31, 32]])
REAL = (PROMPTS > 0).long()


def generated(model: nn.Module, edit: ActivationEdit, **options: Any) -> Tensor:
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 4, "do_sample": False}
    with edit.on(model):
        return model.generate(**given, pad_token_id=0, eos_token_id=None, **options)


def by_hand(model: nn.Module, edit: ActivationEdit, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Greedy generation that runs the whole text for each token and moves the states in a plain hook."""
    ids, real = PROMPTS, REAL

    def put(module: nn.Module, args: tuple, output: object) -> object:
        states = output[0] if isinstance(output, tuple) else output
        new = states.clone()
        if edit.phase != "new":
            first = 0 if edit.site.token == "all" else 4
            new[:, first:5] = move(states[:, first:5])
        if edit.phase != "prompt":
            new[:, 5:] = move(states[:, 5:])
        new = torch.where(real[..., None].bool(), new, states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = blocks_of(model)[1].register_forward_hook(put)
    for _ in range(4):
        places = (real.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=real, position_ids=places, use_cache=False).logits
        following = logits[:, -1:].argmax(-1)
        ids, real = torch.cat([ids, following], 1), torch.cat([real, torch.ones_like(following)], 1)
    handle.remove()
    return ids


@pytest.mark.parametrize(
    ("token", "phase"), [("last", "both"), ("all", "both"), ("all", "prompt"), ("last", "new")]
)
def test_generate_agrees_with_a_loop_by_hand(token, phase, shared_model) -> None:
    shared_model.generation_config.eos_token_id = None
    edit = TangentSteer(Site(1, token=token), ring(), 2 * V, scale=3.0, phase=phase, residual="drop")
    expected = by_hand(shared_model, edit, lambda x: edit.change(x.flatten(0, 1), flat_rows(x)).view_as(x))
    assert torch.equal(generated(shared_model, edit), expected)
    assert torch.equal(generated(shared_model, edit, use_cache=False), expected)
    other = GeodesicSteer(edit.site, ring(), W, phase=phase, residual="drop")
    expected = by_hand(shared_model, other, lambda x: ring().projx(W).expand_as(x))
    assert torch.equal(generated(shared_model, other), expected)


def flat_rows(states: Tensor) -> Selected:
    rows = torch.arange(states.shape[0]).repeat_interleave(states.shape[1])
    return Selected(rows, torch.zeros_like(rows), states.shape[0], 3.0)


def test_beams_keep_the_target_of_their_row(shared_gpt2) -> None:
    shared_gpt2.generation_config.eos_token_id = None
    targets = draw(3, WIDTH, seed=9)
    edit = GeodesicSteer(Site(1), ring(), targets, scale=torch.tensor([1.0, 0.5, 1.0]), residual="drop")
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = generated(shared_gpt2, edit, **options)
    assert torch.equal(found, generated(shared_gpt2, edit, use_cache=False, **options))
    for row, share in enumerate((1.0, 0.5, 1.0)):
        one = GeodesicSteer(Site(1), ring(), targets[row], scale=share, residual="drop")
        assert torch.equal(generated(shared_gpt2, one, **options)[2 * row], found[2 * row])


# Gradients.


@pytest.mark.parametrize("residual", ["keep", "drop"])
def test_gradients_reach_states_directions_targets_and_scales(residual, tiny_gpt2) -> None:
    model = tiny_gpt2.double()
    base = ring()
    circle = Ring(base.frame.double(), base.centre.double())
    start = model.transformer.wte.weight.detach()[IDS].clone()
    scales = torch.tensor([0.1, 0.4, 1.3], dtype=torch.float64)

    def loss(embeds: Tensor, direction: Tensor, target: Tensor, scales: Tensor) -> Tensor:
        edit = (
            TangentSteer(Site(0), circle, direction, scale=0.3, steps=2, residual=residual)
            + GeodesicSteer(SITE, circle, target, scale=scales, residual=residual)
            + GeodesicSteer(Site(2), SPHERE, direction=direction, scale=scales)
        )
        with edit.on(model):
            return model(inputs_embeds=embeds).logits[:, -1].log_softmax(-1)[:, 5].sum()

    values = [each.double().requires_grad_() for each in (start, V / 3, W, scales)]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True, rtol=5e-3)
    assert all(float(grad.norm()) > 1e-6 for grad in torch.autograd.grad(loss(*values), values))


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_a_scale_is_learned_from_the_ends_of_the_way(start, tiny_gpt2) -> None:
    model, base = tiny_gpt2.double(), ring()
    circle = Ring(base.frame.double(), base.centre.double())

    def loss(scale: Tensor) -> Tensor:
        with GeodesicSteer(SITE, circle, W.double(), scale=scale).on(model, must_change=False):
            return model(IDS).logits[:, -1].log_softmax(-1)[:, 5].sum()

    scale = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(scale), scale)
    with torch.no_grad():
        quotient = (loss(scale + 1e-3) - loss(scale - 1e-3)) / 2e-3
    assert abs(float(slope)) > 1e-3
    torch.testing.assert_close(slope, quotient, rtol=1e-2, atol=1e-6)


def test_an_edit_is_learned_after_inference_mode(shared_gpt2) -> None:
    points = ring().at(torch.arange(48) * (2 * math.pi / 48))
    path = manifolds.PathCloud.fit(points, torch.arange(48) // 4)
    direction = V.clone().requires_grad_()
    edit = GeodesicSteer(SITE, path, W, scale=0.5) + TangentSteer(SITE, path, direction, scale=0.1)
    with torch.inference_mode(), edit.on(shared_gpt2):
        expected = shared_gpt2(IDS).logits
    with edit.on(shared_gpt2):
        found = shared_gpt2(IDS).logits
        found[:, -1, 5].sum().backward()
    assert torch.equal(found, expected) and float(direction.grad.norm()) > 1e-3


def test_a_path_keeps_its_digits_at_work_in_a_narrower_model(shared_gpt2) -> None:
    """A path fitted in double precision does in a model of float32 what it does there by itself."""
    points = ring().at(torch.arange(48) * (2 * math.pi / 48))
    path = manifolds.PathCloud.fit(points.double(), torch.arange(48) // 4)
    states = read(shared_gpt2)[:, -1]
    after = read_edited(shared_gpt2, GeodesicSteer(SITE, path, W, residual="drop"))[:, -1]
    assert torch.equal(after, path.projx(W).expand_as(after)) and path.knots.dtype == torch.float64
    after = read_edited(shared_gpt2, TangentSteer(SITE, path, V, scale=0.2, residual="drop"))[:, -1]
    feet = path.projx(states)
    expected = path.retr(feet, 0.2 * path.proju(feet, V.expand_as(feet)))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_a_direction_is_learned_from_zero(shared_gpt2) -> None:
    direction = torch.zeros(WIDTH, requires_grad=True)
    before = read(shared_gpt2)
    with TangentSteer(SITE, ring(), direction).on(shared_gpt2, must_change=False):
        assert torch.equal(read(shared_gpt2), before)
        shared_gpt2(IDS).logits[:, -1, 5].sum().backward()
    assert float(direction.grad.norm()) > 1e-3


# Silence, and bad input.


class Line(LearnedManifold):
    """A straight line through the origin: a direction can be normal to it everywhere."""

    dim, noise, reach, width = 1, 0.0, math.inf, WIDTH

    def __init__(self, direction: Tensor, inside: bool = True) -> None:
        super().__init__()
        self.direction, self.inside, self.name = direction / direction.norm(), inside, "Line"

    def project(self, x: Tensor) -> Projection:
        foot = (x @ self.direction)[..., None] * self.direction
        distance = (x - foot).norm(dim=-1)
        inside = torch.full_like(distance, self.inside).bool()
        return Projection(foot, self.direction.expand_as(x)[..., None], distance, inside)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        return x + u

    def geodesic(self, x: Tensor, y: Tensor, points: int = 17) -> Tensor:
        return x[..., None, :] + torch.linspace(0, 1, points)[:, None] * (y - x)[..., None, :]

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"inside": self.inside}, {"direction": self.direction}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Line:
        return cls(tensors["direction"], values["inside"])


NORMAL = V - (V @ W) / (W @ W) * W


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (TangentSteer(SITE, Line(W), NORMAL), "at 3 of them the direction is normal to the manifold"),
        (GeodesicSteer(SITE, Line(W), direction=NORMAL), "at 3 of them the direction is normal"),
        (GeodesicSteer(SITE, Line(W), direction=NORMAL, length=1.0), "at 3 of them the direction is normal"),
        (TangentSteer(SITE, Line(W), 0 * V), "its direction is zero"),
        (TangentSteer(SITE, Line(W), V, scale=0), "its scale is 0"),
        (TangentSteer(SITE, Line(W, inside=False), V, outside="leave"), "at 3 of them the samples"),
        (TangentSteer(SITE, Line(W), 1e-9 * V), "as far as torch.float32 can tell"),
    ],
)
def test_nothing_changed(edit, reason, shared_gpt2) -> None:
    with pytest.raises(EditError, match=reason), edit.on(shared_gpt2):
        shared_gpt2(IDS)
    before = read(shared_gpt2)
    with edit.on(shared_gpt2, must_change=False):
        assert torch.equal(read(shared_gpt2), before)


def test_states_at_their_target_stay(shared_gpt2) -> None:
    edit = GeodesicSteer(SITE, SPHERE, W, residual="drop") + GeodesicSteer(SITE, SPHERE, 2 * W)
    with pytest.raises(EditError, match="at 3 of them the foot of the state is that of the target"):
        read_edited(shared_gpt2, edit)


def test_opposite_points_are_named(shared_gpt2) -> None:
    edit = Patch(SITE, -W) + GeodesicSteer(SITE, SPHERE, W)
    with pytest.raises(EditError, match=r"NaN.*no shortest geodesic on Sphere.*opposite"):
        read_edited(shared_gpt2, edit)


class Broken(Line):
    """A line in two pieces: no way leads from one side of the origin to the other."""

    def project(self, x: Tensor) -> Projection:
        found = super().project(x)
        return replace(found, inside=found.distance < 1)

    def geodesic(self, x: Tensor, y: Tensor, points: int = 17) -> Tensor:
        apart = (x @ self.direction) * (y @ self.direction) < 0
        if bool(apart.any()):
            raise NoPathError("Broken: no way", apart.nonzero()[:, 0].tolist())
        return super().geodesic(x, y, points)


def test_rows_without_a_way_to_the_target_are_named(shared_gpt2) -> None:
    states = read(shared_gpt2)[:, -1]
    one, two, _ = states / states.norm(dim=-1, keepdim=True)
    goal = one - two  # the first row lies on the target's side, the second does not
    line = Broken(goal)
    rows = ", ".join(str(i) for i in range(3) if states[i] @ goal < 0)
    assert "0" not in rows and "1" in rows
    with pytest.raises(EditError, match=f"no way to the target in rows? {rows} of a batch of 3.*'leave'"):
        read_edited(shared_gpt2, GeodesicSteer(SITE, line, goal))
    edit = GeodesicSteer(SITE, line, goal, outside="leave")  # far from the line are all, and none is asked
    before = read(shared_gpt2)
    with edit.on(shared_gpt2, must_change=False):
        assert torch.equal(read(shared_gpt2), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TangentSteer(SITE, manifolds.Sphere(ndim=2), V), "Sphere.*2 dimensions.*ndim=1"),
        (lambda: TangentSteer(SITE, manifolds.Stiefel(), V), "Stiefel.*2 dimensions"),
        (lambda: TangentSteer(SITE, geoopt.Euclidean(), V), "0 dimensions.*ndim=1"),
        (lambda: TangentSteer(SITE, ring(), V[:5]), "width 5.*Ring.*width 32"),
        (lambda: TangentSteer(SITE, ring(), V * torch.nan), "32 values that are NaN"),
        (lambda: TangentSteer(SITE, ring(), draw(2, 2, WIDTH)), "one vector"),
        (lambda: TangentSteer(SITE, ring(), V, steps=0), "steps is 0"),
        (lambda: TangentSteer(SITE, ring(), V, residual="hold"), "'hold'.*'keep', 'drop'"),
        (lambda: TangentSteer(SITE, ring(), V, outside="go"), "'go'.*'edit', 'leave'"),
        (lambda: GeodesicSteer(SITE, ring()), "neither"),
        (lambda: GeodesicSteer(SITE, ring(), V, direction=V), "both"),
        (lambda: GeodesicSteer(SITE, ring(), V, length=1.0), "length goes with a direction"),
        (lambda: GeodesicSteer(SITE, ring(), direction=V, length=-1.0), "positive"),
        (lambda: GeodesicSteer(SITE, ring(), V, points=1), "points is 1"),
        (lambda: GeodesicSteer(SITE, ring(), draw(2, 2, WIDTH)), "one vector"),
        (lambda: GeodesicSteer(SITE, ring(), V.long()), "int64"),
    ],
)
def test_impossible_edits_are_refused_when_they_are_made(make, words) -> None:
    with pytest.raises(EditError, match=words):
        make()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (TangentSteer(SITE, ring(width=24), V[:24]), "Ring.*width 24.*width 32"),
        (GeodesicSteer(SITE, ring(width=24), V[:24]), "Ring.*width 24.*width 32"),
        (TangentSteer(SITE, SPHERE, V[:24]), "width 24.*width 32"),
    ],
)
def test_a_manifold_of_another_width_is_refused(edit, words, shared_gpt2) -> None:
    with pytest.raises(EditError, match=words):
        edit.attach(shared_gpt2)


def test_an_operation_that_is_not_there_is_named(shared_gpt2) -> None:
    class Bare(Line):
        def expmap(self, x: Tensor, u: Tensor) -> Tensor:
            raise manifolds.MissingOperationError("Bare has no exponential")

    edit = GeodesicSteer(SITE, Bare(W), direction=V)
    with pytest.raises(EditError, match=r"GeodesicSteer\(block 1.*Bare has no exponential"):
        read_edited(shared_gpt2, edit)


def test_means_of_values_are_targets(shared_gpt2) -> None:
    means = {"may": V, "june": W}
    edit = GeodesicSteer.to_value(means, "june", site=SITE, manifold=SPHERE, scale=0.5)
    assert torch.equal(edit.target, W) and edit.scale == 0.5
    with pytest.raises(EditError, match="no mean for 'july'"):
        GeodesicSteer.to_value(means, "july", site=SITE, manifold=SPHERE)


def test_the_size_is_stated() -> None:
    edit = TangentSteer(SITE, ring(), V)
    assert edit.nbytes == 4 * (WIDTH + 2 * WIDTH + WIDTH)
    assert repr(edit) == "TangentSteer(block 1 residual_out @ last, scale=1, on Ring, 512 bytes)"
