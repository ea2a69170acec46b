"""Edits in files: what comes back, what is refused, and that a file is whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoedit.edits import Compose, Edit, LinearSteer, Patch, SwapMeans, io, load_edit
from geoedit.errors import EditError
from geoedit.site import Site

WIDTH = 32
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, W = draw(WIDTH), draw(WIDTH, seed=2)
EDITS = {
    "steer": LinearSteer(Site(1), V, scale=0.5, phase="prompt", metadata={"note": "mine", "runs": [1, 2]}),
    "half": LinearSteer(Site(-1, "mlp_out", "all"), V.to(torch.bfloat16)),
    "rows": LinearSteer(Site(1), V, scale=torch.tensor([0.5, 1.0, 2.0])),
    "swap": SwapMeans(Site(0, "attention_out", 1), V, W, scale=2),
    "one memory": SwapMeans(Site(0), V, V),
    "value": Patch(Site(1, token="value"), draw(3, WIDTH), value_ids=((13, 14), (24,), (33,))),
    "both": LinearSteer(Site(1), V) + Patch(Site(module="transformer.h.0"), W),
    "not whole": LinearSteer(Site(1), draw(WIDTH, 2)[:, 0]),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_saved_comes_back(name, tmp_path) -> None:
    edit = EDITS[name]
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    parts = zip(edit.edits, again.edits, strict=True) if isinstance(edit, Compose) else [(edit, again)]
    for one, other in parts:
        assert type(one) is type(other)
        assert one.tensors().keys() == other.tensors().keys()
        for field, tensor in one.tensors().items():
            assert (
                torch.equal(other.tensors()[field], tensor) and other.tensors()[field].dtype == tensor.dtype
            )
        for field in ("site", "phase", "value_ids", "fingerprint"):
            assert getattr(one, field) == getattr(other, field)
        assert dict(one.metadata) == dict(other.metadata)
        assert isinstance(one.scale, Tensor) or one.scale == other.scale
    assert os.listdir(tmp_path) == ["edit.safetensors"]


def test_a_loaded_edit_does_the_same(shared_model, tmp_path) -> None:
    edit = (LinearSteer(Site(1), 3 * V) + SwapMeans(Site(2), V, W, scale=3)).with_scale(0.5)
    edit.save(tmp_path / "edit.safetensors")
    with torch.no_grad(), edit.on(shared_model):
        expected = shared_model(IDS).logits
    with torch.no_grad(), load_edit(tmp_path / "edit.safetensors").on(shared_model):
        assert torch.equal(shared_model(IDS).logits, expected)


def test_the_model_it_is_of_comes_back(shared_gpt2, shared_llama, tmp_path) -> None:
    LinearSteer(Site(1), V).for_model(shared_gpt2).save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    with again.on(shared_gpt2):
        shared_gpt2(IDS)
    with pytest.raises(EditError, match="another model"):
        again.attach(shared_llama)


def test_the_file_is_plain(tmp_path) -> None:
    """Any safetensors reader finds the tensors, and JSON in the metadata."""
    EDITS["steer"].save(tmp_path / "edit.safetensors")
    with safe_open(tmp_path / "edit.safetensors", framework="np") as file:
        header = json.loads(file.metadata()["geoedit.edit"])
        assert list(file.keys()) == ["direction"]
    assert header["version"] == 1 and header["edit"]["kind"] == "linear-steer"
    assert header["edit"]["values"]["metadata"] == {"note": "mine", "runs": [1, 2]}


def test_a_direction_that_was_learned_is_saved_without_its_graph(tmp_path) -> None:
    direction = (2 * V.clone().requires_grad_()).requires_grad_()
    LinearSteer(Site(1), direction).save(tmp_path / "edit.safetensors")
    assert torch.equal(load_edit(tmp_path / "edit.safetensors").direction, direction.detach())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    EDITS["steer"].save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def changed(path: Path, **changes: object) -> Path:
    """The same file with another header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["geoedit.edit"])
    edit = {**header["edit"], **changes.pop("edit", {})}
    save_file(tensors, path, metadata={"geoedit.edit": json.dumps({**header, "edit": edit, **changes})})
    return path


@pytest.mark.parametrize("length", [0, 5, 40, 300, -1])
def test_a_file_that_was_cut_off(length, saved) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:length])
    with pytest.raises(EditError, match="cannot be read as safetensors"):
        load_edit(saved)


def test_other_files_are_refused(tmp_path) -> None:
    with pytest.raises(EditError, match="no file"):
        load_edit(tmp_path / "nothing.safetensors")
    save_file({"weight": V}, tmp_path / "foreign.safetensors")
    with pytest.raises(EditError, match="not an edit"):
        load_edit(tmp_path / "foreign.safetensors")
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EditError, match="cannot be read"):
        load_edit(tmp_path / "bomb.safetensors")
    save_file({"weight": V}, tmp_path / "damaged.safetensors", metadata={"geoedit.edit": "{"})
    with pytest.raises(EditError, match="damaged description"):
        load_edit(tmp_path / "damaged.safetensors")


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


def test_kinds_and_versions_that_are_not_known(saved) -> None:
    with pytest.raises(EditError, match="version 2"):
        load_edit(changed(saved, version=2))
    changed(saved, version=1)
    with pytest.raises(EditError, match=r"kind 'other' is known; known are .*linear-steer"):
        load_edit(changed(saved, edit={"kind": "other"}))


def test_fields_that_do_not_fit(saved) -> None:
    with pytest.raises(EditError, match="no field 'speed'"):
        load_edit(changed(saved, edit={"values": {"site": {"$site": {"block": 1}}, "speed": 1}}))
    with pytest.raises(EditError, match="cannot be made"):
        load_edit(changed(saved, edit={"values": {}}))
    with pytest.raises(EditError, match="streams are"):
        load_edit(changed(saved, edit={"values": {"site": {"$site": {"block": 1, "stream": "x"}}}}))


def test_what_no_file_can_hold_is_refused_before_writing(tmp_path) -> None:
    with pytest.raises(EditError, match="callable"):
        LinearSteer(Site(1, token=lambda ids, real: real), V).save(tmp_path / "edit.safetensors")
    with pytest.raises(EditError, match=r"metadata\['when'\].*cannot be saved"):
        LinearSteer(Site(1), V, metadata={"when": object()}).save(tmp_path / "edit.safetensors")
    with pytest.raises(EditError, match="does not exist"):
        LinearSteer(Site(1), V).save(tmp_path / "nowhere" / "edit.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch) -> None:
    before = saved.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(io.os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                LinearSteer(Site(2), W).save(saved)
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_that_is_killed_leaves_the_old_file(moment, saved, monkeypatch) -> None:
    before = saved.read_bytes()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(io.os, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        LinearSteer(Site(2), W).save(saved)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(os.listdir(saved.parent)) == 2  # it was killed in the middle of writing
    assert saved.read_bytes() == before
    assert torch.equal(load_edit(saved).direction, V)


def test_a_kind_belongs_to_one_class() -> None:
    with pytest.raises(EditError, match=r"'patch' belongs to geoedit\.edits\.patch\.Patch"):

        class Other(Edit, kind="patch"):
            pass

    class Unsaved(LinearSteer):
        pass

    with pytest.raises(EditError, match="no kind"):
        Unsaved(Site(1), V).save("never")
