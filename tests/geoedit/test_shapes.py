import math

import pytest
import torch

from geoedit import Concept, EditError, Template
from geoedit.shapes import concept_manifold, without_sentences
from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.point_cloud import PointCloud

WIDTH = 16


def concept(kind, count, coordinates=None):
    values = [f"v{number}" for number in range(count)]
    return Concept("thing", values, [Template("a {value}")], kind, coordinates=coordinates)


def turned(points, width=WIDTH):
    """Points turned at random into a wider space."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return points.double() @ frame[: points.shape[1]]


def arc(count, turn, radius=3.0):
    angle = torch.arange(count, dtype=torch.float64) * (turn / count)
    return turned(torch.stack([radius * angle.cos(), radius * angle.sin()], 1))


def samples(means, each=6, noise=0.02):
    """Labels, sentences, and states scattered about the means."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(len(means)).repeat(each)
    sentences = torch.arange(each).repeat_interleave(len(means))
    scatter = torch.randn(len(labels), means.shape[1], generator=generator, dtype=means.dtype)
    return means[labels] + noise * scatter / means.shape[1] ** 0.5, labels, sentences


def test_a_cycle_is_a_closed_curve_through_its_values(device):
    states, labels, _ = samples(arc(12, 2 * math.pi))
    found = concept_manifold(states.to(device), labels.to(device), concept("cycle", 12))
    assert isinstance(found.manifold, PathCloud) and found.manifold.closed
    assert (found.reason, found.note) == ("", "")
    between = arc(24, 2 * math.pi)[1::2].to(device)
    assert float(found.manifold.project(between).distance.max()) < 0.03


def test_the_samples_decide_and_a_disagreement_is_told():
    states, labels, _ = samples(arc(12, 2.0))
    found = concept_manifold(states, labels, concept("cycle", 12))
    assert not found.manifold.closed and "cycle" in found.note and "open" in found.note
    states, labels, _ = samples(arc(12, 2 * math.pi))
    found = concept_manifold(states, labels, concept("line", 12))
    assert found.manifold.closed and "line" in found.note and "closed" in found.note
    asked = concept_manifold(states, labels, concept("line", 12), closed=False)
    assert not asked.manifold.closed and asked.note == ""


def test_a_grid_is_a_sheet():
    places = [(x, y) for x in range(5) for y in range(4)]
    flat = torch.tensor(places, dtype=torch.float64)
    bowl = turned(torch.cat([flat, 0.1 * flat.square().sum(1, keepdim=True)], 1))
    states, labels, _ = samples(bowl)
    found = concept_manifold(states, labels, concept("grid", 20, places))
    assert isinstance(found.manifold, PathCloud) and found.manifold.dim == 2
    middle = torch.tensor([[2.5, 1.5, 0.1 * (2.5**2 + 1.5**2)]])
    assert float(found.manifold.project(turned(middle)).distance) < 0.02


def test_categories_are_a_cloud_of_all_states():
    generator = torch.Generator().manual_seed(2)
    sphere = torch.nn.functional.normalize(
        torch.randn(400, 3, generator=generator, dtype=torch.float64), dim=1
    )
    labels = (sphere[:, 0] > 0).long() + 2 * (sphere[:, 1] > 0).long()
    found = concept_manifold(turned(sphere), labels, concept("categorical", 4), dim=2)
    assert isinstance(found.manifold, PointCloud) and found.manifold.dim == 2
    feet = found.manifold.projx(turned(1.05 * sphere[:20]))
    assert float((feet.norm(dim=1) - 1).abs().max()) < 0.02


@pytest.mark.parametrize(("kind", "count"), [("categorical", 2), ("cycle", 1)])
def test_too_few_samples_give_a_reason(kind, count):
    states, labels, _ = samples(arc(count, 2.0), each=2)
    found = concept_manifold(states, labels, concept(kind, count))
    assert found.manifold is None and found.reason


def test_what_sentences_add_is_no_noise_of_the_manifold():
    states, labels, sentences = samples(arc(12, 2 * math.pi))
    generator = torch.Generator().manual_seed(3)
    moved = states + torch.randn(6, WIDTH, generator=generator, dtype=torch.float64)[sentences]
    raw = concept_manifold(moved, labels, concept("cycle", 12)).manifold
    clean = concept_manifold(moved, labels, concept("cycle", 12), sentences=sentences).manifold
    assert raw.noise > 2 and clean.noise < 0.03


def test_values_and_sentences_are_told_apart_where_some_pairs_are_missing():
    generator = torch.Generator().manual_seed(4)
    value, sentence = (torch.randn(5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    kept = pairs[torch.randperm(25, generator=generator)[:19]]
    states = value[kept[:, 0]] + sentence[kept[:, 1]]
    found = without_sentences(states, kept[:, 0], kept[:, 1])
    rest = found - value[kept[:, 0]]
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.mean(0), states.mean(0))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_states_is_kept(kind):
    states, labels, sentences = samples(arc(12, 2 * math.pi))
    assert without_sentences(states.to(kind), labels, sentences).dtype == kind
    found = concept_manifold(states.to(kind), labels, concept("cycle", 12), sentences=sentences)
    assert found.manifold.projx(states[:2].to(kind)).dtype == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states, labels: (states.index_fill(0, torch.tensor([3]), torch.nan), labels), "row 3"),
        (lambda states, labels: (states, labels + 1), "0 to 11"),
        (lambda states, labels: (states, labels.clamp(max=10)), "have no state"),
        (lambda states, labels: (states[:0], labels[:0]), "one floating-point row"),
    ],
)
def test_samples_that_do_not_fit_are_named(change, message):
    states, labels, _ = samples(arc(12, 2 * math.pi))
    with pytest.raises(EditError, match=message):
        concept_manifold(*change(states, labels), concept("cycle", 12))
