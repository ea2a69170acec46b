"""Shards: whole or absent, taken up again, bounded in memory, read back bit by bit."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from geoedit.activations import Activations, collect, store
from geoedit.activations.store import Shards
from geoedit.concept import Concept, Template
from geoedit.errors import EditError
from geoedit.site import Site

CONCEPT = Concept(
    "months",
    ["may", "june", "july", "april"],
    [Template(text) for text in ("the {value} is", "in {value}", "{value}")],
)
SITES = [Site(0), Site(1, "mlp_out", "value"), Site(2, token="all")]
PROMPTS = CONCEPT.prompts()


def same(one: Activations, two: Activations) -> None:
    assert list(one) == list(two)
    assert (one.prompts, one.labels) == (two.prompts, two.labels)
    assert one.fingerprint.difference(two.fingerprint) is None
    for site in one:
        assert torch.equal(one[site], two[site])
        assert torch.equal(one.rows(site), two.rows(site))


def test_a_folder_reads_back_what_memory_holds(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    wanted = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3)
    found = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3, out=tmp_path, shard_bytes=1)
    same(found, wanted)
    same(Activations.load(tmp_path), wanted)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 4
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


def test_dtype_and_shard_size(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    found = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, out=tmp_path, dtype=torch.float16)
    assert found[SITES[0]].dtype == torch.float16
    assert len(list(tmp_path.glob("shard-*"))) == 1


def test_no_more_than_a_shard_and_a_batch_is_held(
    tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch
) -> None:
    held, flush = [], Shards.flush

    def spy(self: Shards) -> None:
        held.append(self.size)
        flush(self)

    monkeypatch.setattr(Shards, "flush", spy)
    limit = 3000
    collect(tiny_model, tiny_tokenizer, PROMPTS * 5, SITES, batch_size=2, out=tmp_path, shard_bytes=limit)
    one_batch = 2 * (1 + 1 + 3) * (32 * 4 + 8)
    assert len(held) > 5
    assert max(held) <= limit + one_batch


class StopError(RuntimeError):
    """Something that ends a run."""


def test_a_run_that_was_cut_off_is_taken_up_again(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    wanted = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3)
    calls: list[int] = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StopError

    hook = tiny_model.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3, out=tmp_path, shard_bytes=1)
    hook.remove()
    with pytest.raises(EditError, match=r"holds no index.json.*to finish it"):
        Activations.load(tmp_path)
    counts: list[int] = []
    tiny_model.register_forward_pre_hook(lambda *_: counts.append(1))
    found = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3, out=tmp_path, shard_bytes=1)
    assert len(counts) == 2
    same(found, wanted)
    again = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, batch_size=3, out=tmp_path)
    assert len(counts) == 2
    same(again, wanted)


def write_until_killed(folder: Path) -> None:
    """Write shards; while the second one is on its way, cut it short and die at once."""
    saved: list[Path] = []

    def dying(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata=metadata)
        saved.append(path)
        if len(saved) == 2:
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    store.save_file = dying
    shards = Shards(folder, [Site(0)], "request", None, 1, 0)
    for prompt in range(3):
        shards.add(0, torch.tensor([prompt]), torch.ones(1, 4))
        shards.batch_done([prompt])


def test_a_killed_process_leaves_no_half_shard(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(tmp_path,))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-0-00000.safetensors"]
    with safe_open(tmp_path / "shard-0-00000.safetensors", "pt") as shard:
        assert shard.get_tensor("prompts").tolist() == [0]
    with pytest.raises(EditError, match=r"no collection was finished"):
        Activations.load(tmp_path)
    assert Shards(tmp_path, [Site(0)], "request", None, 1, 0).done == {0}


def test_another_collection_stays_untouched(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in ({"prompts": PROMPTS[:3]}, {"sites": SITES[:1]}, {"dtype": torch.float64}):
        arguments = {"prompts": PROMPTS, "sites": SITES, **change}
        with pytest.raises(EditError, match=r"holds another collection"):
            collect(tiny_model, tiny_tokenizer, out=tmp_path, **arguments)
    (tmp_path / "index.json").unlink()
    with pytest.raises(EditError, match=r"belongs to another collection"):
        collect(tiny_model, tiny_tokenizer, PROMPTS[:3], SITES, out=tmp_path)
    before.pop("index.json")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_damage_is_named(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    collect(tiny_model, tiny_tokenizer, PROMPTS, SITES, out=tmp_path, batch_size=4, shard_bytes=1)
    shards = sorted(tmp_path.glob("shard-*"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-10])
    with pytest.raises(EditError, match=r"shard-0-00000.* damaged"):
        Activations.load(tmp_path)
    shards[0].unlink()
    with pytest.raises(EditError, match=r"shard-0-00000.* gone"):
        Activations.load(tmp_path)
    shards[0].write_bytes(content)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "shards": index["shards"][1:]}))
    with pytest.raises(EditError, match=r"hold 8 of 12 prompts"):
        Activations.load(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(EditError, match=r"no index of a collection"):
        Activations.load(tmp_path)


def test_what_no_file_can_hold_is_refused_first(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    tiny_model.eval()
    chosen = Site(0, token=lambda ids, real: real)
    with pytest.raises(EditError, match=r"callable"):
        collect(tiny_model, tiny_tokenizer, PROMPTS, [chosen], out=tmp_path / "new")
    with pytest.raises(EditError, match=r"out= needs prompts as text"):
        collect(tiny_model, None, {"input_ids": torch.ones(2, 3).long()}, [Site(0)], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(EditError, match=r"is a file"):
        collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)], out=tmp_path / "file")
