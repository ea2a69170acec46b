"""Edits along manifolds in files: with the manifold that they need, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import geoopt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import manifolds
from geoedit.edits import Compose, GeodesicSteer, LinearSteer, TangentSteer, load_edit
from geoedit.errors import EditError
from geoedit.site import Site
from manifolds.cloud.learned import LearnedManifold
from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.point_cloud import PointCloud
from manifolds.cloud.sampled_metric import SampledMetric

WIDTH = 32
SITE = Site(1)
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, W = draw(WIDTH), draw(WIDTH, seed=2)


def circle(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    frame = torch.linalg.qr(draw(WIDTH, 2, seed=5).double()).Q
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return (2 * torch.stack([angle.cos(), angle.sin()], -1) @ frame.mT).to(dtype)


CLOUD = PointCloud.fit(circle(200), dim=1, neighbors=12)
PATH = PathCloud.fit(circle(48, torch.float64), torch.arange(48) // 4)
METRIC = SampledMetric(circle(9), draw(9, 4, WIDTH, seed=7), damping=0.1)
BENT = PathCloud.fit(circle(48), torch.arange(48) // 4).with_metric(METRIC)
EDITS = {
    "point cloud": TangentSteer(SITE, CLOUD, V, scale=0.5, steps=2, residual="drop", metadata={"n": 200}),
    "path": TangentSteer(SITE, PATH, V, scale=torch.tensor([0.5, 1.0, 2.0]), outside="edit"),
    "geodesic": GeodesicSteer(SITE, PATH, direction=V, length=0.5, phase="prompt"),
    "metric": GeodesicSteer(SITE, BENT, W, scale=0.5),
    "sphere": GeodesicSteer(SITE, manifolds.Sphere(), W, scale=0.5, points=9),
    "flat": TangentSteer(SITE, manifolds.Euclidean(), V.bfloat16()),
    "ball": TangentSteer(SITE, geoopt.PoincareBall(c=0.25), 0.1 * V),
    "both": TangentSteer(SITE, CLOUD, V) + GeodesicSteer(SITE, PATH, direction=W) + LinearSteer(SITE, W),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_saved_comes_back_and_does_the_same_to_the_bit(name, shared_gpt2, tmp_path) -> None:
    edit = EDITS[name]
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    with torch.no_grad(), edit.on(shared_gpt2):
        expected = shared_gpt2(IDS).logits
    with torch.no_grad(), again.on(shared_gpt2):
        assert torch.equal(shared_gpt2(IDS).logits, expected)
    parts = zip(edit.edits, again.edits, strict=True) if isinstance(edit, Compose) else [(edit, again)]
    for one, other in parts:
        assert type(one) is type(other) and repr(one) == repr(other)
        if isinstance(one, LinearSteer):
            continue
        assert type(one.manifold) is type(other.manifold)
        for field in ("site", "phase", "residual", "outside", "steps", "length", "points"):
            assert getattr(one, field, None) == getattr(other, field, None)
        assert dict(one.metadata) == dict(other.metadata)
    assert os.listdir(tmp_path) == ["edit.safetensors"]


def test_a_flat_manifold_has_an_infinite_reach(tmp_path) -> None:
    values, tensors = CLOUD.describe()
    flat = PointCloud.rebuild({**values, "reach": math.inf, "noise": math.nan}, tensors)
    TangentSteer(SITE, flat, V).save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors").manifold
    assert again.reach == math.inf and math.isnan(again.noise)


def test_the_size_that_is_stated_is_that_of_the_file(tmp_path) -> None:
    for name in ("point cloud", "path", "metric", "sphere"):
        EDITS[name].save(tmp_path / name)
        header = (tmp_path / name).stat().st_size - EDITS[name].nbytes
        assert 0 < header < 8000
    assert EDITS["sphere"].nbytes == 4 * WIDTH


def test_the_file_is_plain(tmp_path) -> None:
    """Any safetensors reader finds the tensors; known manifolds are there by name."""
    EDITS["sphere"].save(tmp_path / "sphere")
    with safe_open(tmp_path / "sphere", framework="np") as file:
        assert list(file.keys()) == ["target"]
        values = json.loads(file.metadata()["geoedit.edit"])["edit"]["values"]
    assert values["manifold"] == {"known": "manifolds.Sphere", "values": {"ndim": 1}}
    EDITS["path"].save(tmp_path / "path")
    with safe_open(tmp_path / "path", framework="np") as file:
        assert {"direction", "scale", "manifold.knots"} <= set(file.keys())
        values = json.loads(file.metadata()["geoedit.edit"])["edit"]["values"]
    assert values["manifold"]["learned"] == "path-cloud"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    EDITS["path"].save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off(share, saved) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(EditError, match="cannot be read as safetensors"):
        load_edit(saved)


def changed(path: Path, drop: str = "", **manifold: object) -> Path:
    """The same file without a tensor, or with another description of its manifold."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        header = json.loads(file.metadata()["geoedit.edit"])
    values = header["edit"]["values"]
    values["manifold"] = {**values["manifold"], **manifold}
    save_file(tensors, path, metadata={"geoedit.edit": json.dumps(header)})
    return path


def test_what_is_missing_or_unknown_is_named(saved) -> None:
    with pytest.raises(EditError, match=r"learned manifold of kind 'else'.*path-cloud.*Import"):
        load_edit(changed(saved, learned="else"))
    with pytest.raises(EditError, match=r"No manifold is called 'Torus'.*manifolds\.Sphere"):
        load_edit(changed(saved, learned=None, known="Torus"))
    with pytest.raises(EditError, match="no manifold: the file is damaged"):
        load_edit(changed(saved, values=None))
    EDITS["path"].save(saved)
    with pytest.raises(EditError, match=r"path-cloud cannot be made again.*knots"):
        load_edit(changed(saved, drop="manifold.knots"))
    EDITS["path"].save(saved)
    with pytest.raises(EditError, match="path-cloud cannot be made again"):
        load_edit(changed(saved, values={}))


def test_a_manifold_that_no_file_can_name_is_refused(tmp_path) -> None:
    class Own(geoopt.Sphere):
        pass

    class Learned(PathCloud):
        pass

    for manifold in (Own(), geoopt.ProductManifold((geoopt.Sphere(), WIDTH))):
        with pytest.raises(EditError, match="A file cannot name the manifold"):
            TangentSteer(SITE, manifold, V).save(tmp_path / "edit")
    assert Learned.kind is None and issubclass(Learned, LearnedManifold)
    with pytest.raises(EditError, match="A file cannot name the manifold Learned"):
        TangentSteer(SITE, Learned(*PATH.describe()), V).save(tmp_path / "edit")
    assert os.listdir(tmp_path) == []
