"""Two processes that were really launched (gloo on the CPU) against one: the same states and figures."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geoedit.activations import Activations, collect, statistics
from geoedit.site import Site

ROOT = Path(__file__).parents[2]
SITES = [Site(0), Site(1, "mlp_hidden", "value"), Site(2, token="all")]
VALUES = ["may", "june", "july", "april", "march"]
PROMPTS = [
    text.format(v) for v in VALUES for text in ("the {} is", "in {}", "the day after {} is a day", "{}")
]
NAMES = [value for value in VALUES for _ in range(4)]

WORKER = """
import json, os, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from geoedit.activations import collect, statistics
from geoedit.anatomy import anatomy
from geoedit.errors import EditError
from geoedit.site import Site

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
task = json.loads((folder / "task.json").read_text())
prompts, names = task["prompts"], task["names"]
sites = [Site.from_dict(fields) for fields in task["sites"]]
model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
anatomy(model)  # which runs the model itself
calls = []
hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
found = collect(model, tokenizer, prompts, sites, values=names, batch_size=4)
ran = torch.tensor(len(calls))
stats = statistics(model, tokenizer, prompts, sites, values=names, covariance=True, batch_size=4)
tensors = {"calls": ran}
for k, site in enumerate(sites):
    tensors[f"states.{k}"], tensors[f"rows.{k}"] = found[site].clone(), found.rows(site).clone()
    for label in (None, *stats.labels):
        tensors[f"count.{k}.{label}"] = torch.tensor(stats.count(site, label))
        tensors[f"mean.{k}.{label}"] = stats.mean(site, label).clone()
        tensors[f"covariance.{k}.{label}"] = stats.covariance(site, label).clone()
few = collect(model, tokenizer, prompts[:1], sites[:1])
tensors["few"] = few[sites[0]].clone()
options = {"values": names, "batch_size": 4, "shard_bytes": 1}
shards = collect(model, tokenizer, prompts, sites, out=folder / "out", **options)
tensors["from shards"] = shards[sites[2]].clone()
save_file(tensors, folder / f"{rank}.safetensors")
hook.remove()
model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("july")] = float("nan")
try:
    collect(model, tokenizer, ["may", "the july is"], sites[:1], batch_size=1)
except EditError as error:
    (folder / f"{rank}.error").write_text(str(error))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Run the worker in two processes; the folder holds what each of them found."""
    import json

    import transformers

    folder = tmp_path_factory.mktemp("launched")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=len(tiny_tokenizer),
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            initializer_range=0.2,
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    task = {"prompts": PROMPTS, "names": NAMES, "sites": [site.to_dict() for site in SITES]}
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(ended)
    return folder


@pytest.fixture(scope="module")
def alone(launched: Path) -> tuple:
    """The same model, read by this one process."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(launched / "model", dtype=torch.float64)
    return model, transformers.AutoTokenizer.from_pretrained(launched / "model")


def test_states_are_gathered_in_the_order_of_the_prompts(launched: Path, alone: tuple) -> None:
    wanted = collect(*alone, PROMPTS, SITES, values=NAMES, batch_size=4)
    for rank in range(2):
        found = load_file(launched / f"{rank}.safetensors")
        for place, site in enumerate(SITES):
            assert torch.equal(found[f"rows.{place}"], wanted.rows(site))
            torch.testing.assert_close(found[f"states.{place}"], wanted[site], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["from shards"], wanted[SITES[2]], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["few"], wanted[SITES[0]][:1], rtol=1e-12, atol=1e-14)


def test_figures_are_those_of_one_process(launched: Path, alone: tuple) -> None:
    wanted = statistics(*alone, PROMPTS, SITES, values=NAMES, covariance=True, batch_size=4)
    for rank in range(2):
        found = load_file(launched / f"{rank}.safetensors")
        for place, site in enumerate(SITES):
            for label in (None, *VALUES):
                key = f"{place}.{label}"
                assert int(found[f"count.{key}"]) == wanted.count(site, label)
                for name, figure in (
                    ("mean", wanted.mean(site, label)),
                    ("covariance", wanted.covariance(site, label)),
                ):
                    got = found[f"{name}.{key}"]
                    assert (got - figure).norm() <= 1e-12 * figure.norm(), (name, key)


def test_the_prompts_are_split(launched: Path) -> None:
    calls = [int(load_file(launched / f"{rank}.safetensors")["calls"]) for rank in range(2)]
    assert sum(calls) == 5 and min(calls) == 2


def test_each_process_writes_its_own_shards(launched: Path, alone: tuple) -> None:
    names = sorted(path.name for path in (launched / "out").glob("shard-*"))
    assert {name.split("-")[1] for name in names} == {"0", "1"}
    opened = Activations.load(launched / "out")
    wanted = collect(*alone, PROMPTS, SITES, values=NAMES)
    for site in SITES:
        torch.testing.assert_close(opened[site], wanted[site], rtol=1e-12, atol=1e-14)


def test_an_error_in_one_process_is_raised_in_both(launched: Path) -> None:
    words = sorted((launched / f"{rank}.error").read_text() for rank in range(2))
    assert (
        words[0].startswith("process ")
        and "failed: EditError: prompt 1 ('the july is') gives NaN" in words[0]
    )
    assert words[1].startswith("prompt 1 ('the july is') gives NaN")
