"""Runs that are killed, shared by processes or stopped by a NaN. One launched process forks all that die."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from geoedit.errors import EditError
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.checkpoint import Checkpoint
from geoedit.sliders.training.run import train
from geoedit.sliders.training.task import Batch, Task

ROOT = Path(__file__).parents[3]
STEPS = 8

WORKER = """
import json, os, signal, socket, sys, traceback
from pathlib import Path
from types import SimpleNamespace
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training import run as runs
from geoedit.sliders.training.language import LanguageTask
from geoedit.sliders.training.processes import Workers, gradients
from geoedit.sliders.training.run import train
from geoedit.sliders.training.task import Batch

torch.set_num_threads(1)
folder, steps = Path(sys.argv[1]), int(sys.argv[2])


class Words:
    eos_token_id = 2

    def __call__(self, text):
        return SimpleNamespace(input_ids=[3 + sum(map(ord, word)) % 20 for word in text.split()])

    def decode(self, ids):
        return " ".join(map(str, ids))


class Killed(LanguageTask):
    at = None

    def draw(self, step, generator):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(step, generator)


def begin(output, at=None, **options):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    spec = SliderSpec(
        name="up", kind="language",
        target="the {x} is", positive="the big {x} is", negative="the small {x} is",
        preserve={"x": ["house", "tree", "sea"]}, unrelated=["one day"],
    )
    task = Killed(model, Words(), spec, batch_size=6)
    task.at = at
    slider = train(
        model, spec, task=task, steps=steps, batch_size=6, output=output, checkpoint_every=2, cache=6,
        refresh=3, on_policy=0.5, trajectory_steps=3, rank=2, average=0.9, show=False, **options,
    )
    tensors = {}
    for _, path, change in slider:
        tensors[path + ".left"] = change.matrix.left.contiguous().clone()
        tensors[path + ".right"] = change.matrix.right.contiguous().clone()
    save_file(tensors, Path(output) / f"end-{os.environ.get('RANK', '0')}.safetensors")


def forked(*calls):
    running = []
    for call in calls:
        process = os.fork()
        if not process:
            try:
                call()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        running.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running]


def in_write(output):
    whole = os.replace

    def killed(source, target):
        if "step-00000006" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    os.replace = killed
    begin(output)


ended = {"whole": forked(lambda: begin(folder / "whole"))}
for at in (0, 3, steps - 1):
    output = folder / f"killed-{at}"
    ended[output.name] = forked(lambda: begin(output, at)) + forked(lambda: begin(output))
output = folder / "killed-often"
ended[output.name] = [code for at in (1, 4, 5, None) for code in forked(lambda: begin(output, at))]
output = folder / "killed-in-write"
ended[output.name] = forked(lambda: in_write(output))
ended["left behind"] = [path.name for path in (output / "checkpoints").iterdir()]
ended[output.name] += forked(lambda: begin(output))

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]


def shared(rank):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }
    workers = Workers.current()
    found = {}
    for rows in (1, 5, 8):
        for pieces in (1, 3):
            weight, batch = joined(rows)
            losses = gradients(lambda b: loss(weight, b), batch, [weight], workers=workers, pieces=pieces)
            found |= {f"{rows}.{pieces}.gradient": weight.grad, f"{rows}.{pieces}.losses": losses}
    save_file(found, folder / f"gradients-{rank}.safetensors")
    try:
        gradients(lambda b: 1 / 0 if rank else loss(weight, b), batch, [weight], workers=workers)
    except Exception as error:
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    begin(folder / "shared", accumulate=2)
    torch.distributed.destroy_process_group()


def joined(rows):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=generator))
    return weight, Batch({"x": torch.randn(rows, 4, dtype=torch.float64, generator=generator)})


def loss(weight, batch):
    return (batch["x"] @ weight).tanh().square().sum(-1)


ended["shared"] = forked(lambda: shared(0), lambda: shared(1))
(folder / "ended.json").write_text(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's folder, with all its runs."""
    folder = tmp_path_factory.mktemp("durable")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(folder / "worker.py"), str(folder), str(STEPS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def outcome(folder: Path, name: str) -> list:
    return json.loads((folder / "ended.json").read_text())[name]


@pytest.mark.parametrize("name", ["killed-0", "killed-3", "killed-7", "killed-often", "killed-in-write"])
def test_a_killed_run_ends_with_the_same_bits(launched: Path, name: str) -> None:
    codes = outcome(launched, name)
    assert codes == [-9] * (len(codes) - 1) + [0], (launched / "stderr").read_text()
    whole, ended = (load_file(launched / run / "end-0.safetensors") for run in ("whole", name))
    assert whole.keys() == ended.keys()
    assert any(tensor.abs().sum() > 0 for path, tensor in whole.items() if path.endswith("left"))
    assert all(torch.equal(whole[path], ended[path]) for path in whole)
    losses = [Checkpoint.load(launched / run).history for run in ("whole", name)]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]


def test_a_checkpoint_cut_off_while_it_was_written_is_never_seen_and_is_swept_away(launched: Path) -> None:
    left = outcome(launched, "left behind")
    assert sorted(name for name in left if not name.endswith(".tmp")) == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]
    assert any(name.endswith(".tmp") for name in left)
    kept = sorted(path.name for path in (launched / "killed-in-write" / "checkpoints").iterdir())
    assert kept == ["step-00000006.safetensors", "step-00000008.safetensors"]


def test_two_processes_have_the_gradient_of_the_joined_batch(launched: Path) -> None:
    assert outcome(launched, "shared") == [0, 0], (launched / "stderr").read_text()
    for rows in (1, 5, 8):
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
        x = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
        wanted = (x @ weight).tanh().square().sum(-1)
        wanted.mean().backward()
        for rank in range(2):
            found = load_file(launched / f"gradients-{rank}.safetensors")
            for pieces in (1, 3):
                torch.testing.assert_close(found[f"{rows}.{pieces}.losses"].double(), wanted.detach())
                torch.testing.assert_close(
                    found[f"{rows}.{pieces}.gradient"], weight.grad, rtol=1e-12, atol=1e-14
                )


def test_two_processes_train_as_one(launched: Path) -> None:
    alone, shared = (Checkpoint.load(launched / run) for run in ("whole", "shared"))
    losses = [[entry["loss"] for entry in run.history] for run in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    first, second = (load_file(launched / "shared" / f"end-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_when_one_process_fails_all_stop(launched: Path) -> None:
    assert (launched / "error-1").read_text().startswith("ZeroDivisionError")
    assert "process 1 of 2 failed" in (launched / "error-0").read_text()


class Line(Task):
    """One linear layer is to give a number for each row; a step can be made to fail."""

    name = "line"

    def __init__(self, model: nn.Module, fails: int | None = None) -> None:
        self.model, self.fails, self.step = model, fails, 0
        self.components = {"model": model}

    def prepare(self, settings, generator) -> None:
        self.drawn = torch.zeros(())

    def draw(self, step, generator) -> Batch:
        self.step, self.drawn = step, self.drawn + 1
        return Batch({"x": torch.randn(4, 3, generator=generator), "time": torch.arange(4.0) * 100})

    def loss(self, batch):
        losses = (self.model(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().sum(-1)
        if self.step == self.fails:
            losses = losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])
        return losses

    def describe(self, batch, row) -> str:
        return f"timestep {float(batch['time'][row]):g}, prompt 'a line'"

    def state(self):
        return {"drawn": self.drawn}

    def load_state(self, state) -> None:
        self.drawn = state["drawn"]


SPEC = SliderSpec(name="line", target="a line", positive="a long line", negative="a short line")


def run(output: Path | None, fails: int | None = None, steps: int = 6, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    asked = {"checkpoint_every": 2, "show": False, "card": False} | options
    return train(model, SPEC, task=Line(model, fails), steps=steps, batch_size=4, output=output, **asked)


def bits(slider) -> list[torch.Tensor]:
    return [part for _, _, change in slider for part in (change.matrix.left, change.matrix.right)]


@pytest.mark.parametrize("fails", [0, 3, 4])
def test_a_nan_stops_the_run_and_says_where_and_the_run_can_go_on(tmp_path: Path, fails: int) -> None:
    with pytest.raises(EditError, match=rf"step {fails}: row 1 \(timestep 100, prompt 'a line'\): nan"):
        run(tmp_path / "stopped", fails)
    kept = Checkpoint.load(tmp_path / "stopped")
    assert kept.step == fails and len(kept.history) == fails and int(kept.task["drawn"]) == fails
    assert all(bool(tensor.isfinite().all()) for tensor in kept.adapter.values())
    mended, whole = run(tmp_path / "stopped"), run(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(bits(mended), bits(whole), strict=True))


def test_a_nan_without_an_output_says_that_nothing_is_kept() -> None:
    with pytest.raises(EditError, match=r"step 2: .*output="):
        run(None, 2)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path, fails=0)
    assert all(torch.equal(a, b) for a, b in zip(bits(first), bits(again), strict=True))


def test_another_settings_run_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    with pytest.raises(EditError, match="rank was 4 and is now 2"):
        run(tmp_path, steps=2, rank=2)
