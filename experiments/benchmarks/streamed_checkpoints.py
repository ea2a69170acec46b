"""A pair of checkpoints of a billion parameters read as one update: how much memory, how fast.

Both checkpoints are written in shards, in bfloat16, in the shapes of a Llama of 1.2 billion parameters. Each
way to go through all differences runs in a process of its own, whose peak memory is asked of the system.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peft_analysis.updates.read import read_update


@dataclass(frozen=True)
class Settings:
    """The shapes of the model, the largest shard in bytes, the rounds, the aim in bytes, and the seed."""

    width: int = 2048
    inner: int = 8192
    key_width: int = 512
    blocks: int = 16
    vocabulary: int = 128256
    shard: int = 512 * 2**20
    rounds: int = 2
    limit: int = 2 * 10**9
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Write the pair, stream it, and hold it against loading both checkpoints whole."""
    settings = settings or Settings()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("base", "tuned")}
        count = write_pair(folders["base"], folders["tuned"], settings)
        taken: dict[str, list[dict[str, float]]] = {"streamed": [], "whole": []}
        for _ in range(settings.rounds):
            for way in taken:
                taken[way].append(measured(way, folders["base"], folders["tuned"]))
    ratios = sorted(
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(taken["streamed"], taken["whole"], strict=True)
    )
    ours, theirs = (min(taken[way], key=lambda found: found["seconds"]) for way in ("streamed", "whole"))
    peak = max(found["peak"] for found in taken["streamed"])
    peer_peak = max(found["peak"] for found in taken["whole"])
    if abs(ours["norm"] - theirs["norm"]) > 1e-4 * theirs["norm"]:
        raise RuntimeError(f"the two ways disagree: norms {ours['norm']} and {theirs['norm']}")
    return [
        {
            "work": f"a pair of {count / 1e9:.2f} billion parameters streamed in {peak / 1e9:.2f} GB",
            "peer": f"both loaded whole (safetensors), {peer_peak / 1e9:.2f} GB",
            "parameters": count,
            "peak_bytes": peak,
            "peer_peak_bytes": peer_peak,
            "limit_bytes": settings.limit,
            "under_the_limit": peak < settings.limit,
            "ours_ms": round(ours["seconds"] * 1e3, 1),
            "peer_ms": round(theirs["seconds"] * 1e3, 1),
            "ratio": round(ratios[len(ratios) // 2], 3),
            "low": round(ratios[0], 3),
            "high": round(ratios[-1], 3),
            "rounds": settings.rounds,
        }
    ]


def shapes(settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a Llama with a tied head."""
    width, inner, keys = settings.width, settings.inner, settings.key_width
    yield "model.embed_tokens.weight", (settings.vocabulary, width)
    for block in range(settings.blocks):
        path = f"model.layers.{block}"
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{path}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{path}.mlp.gate_proj.weight", (inner, width)
        yield f"{path}.mlp.up_proj.weight", (inner, width)
        yield f"{path}.mlp.down_proj.weight", (width, inner)
        yield f"{path}.input_layernorm.weight", (width,)
        yield f"{path}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def write_pair(base: Path, tuned: Path, settings: Settings) -> int:
    """Write both folders shard by shard; the number of parameters."""
    generator = torch.Generator().manual_seed(settings.seed)
    tile = 0.02 * torch.randn(2**20, generator=generator)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": settings.width,
        "intermediate_size": settings.inner, "num_hidden_layers": settings.blocks,
        "num_attention_heads": settings.width // 64, "num_key_value_heads": settings.key_width // 64,
        "vocab_size": settings.vocabulary, "tie_word_embeddings": True,
    }  # fmt: skip
    count = 0
    for folder, step in ((base, 0.0), (tuned, 0.1)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        values = (tile + step * tile.roll(1)).to(torch.bfloat16)
        places: dict[str, str] = {}
        shard: dict[str, torch.Tensor] = {}
        size, number, count = 0, 1, 0
        for name, shape in [*shapes(settings), ("", ())]:
            length = torch.Size(shape).numel() if name else 0
            if shard and (not name or size + 2 * length > settings.shard):
                save_file(shard, folder / f"part-{number}.safetensors")
                shard, size, number = {}, 0, number + 1
            if name:
                shard[name] = values.repeat(-(-length // len(values)))[:length].reshape(shape)
                places[name] = f"part-{number}.safetensors"
                size += 2 * length
                count += length
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return count


def measured(way: str, base: Path, tuned: Path) -> dict[str, float]:
    """What `main` finds in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.streamed_checkpoints",
        way,
        str(base),
        str(tuned),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(way: str, base: str, tuned: str) -> dict[str, float]:
    """Go through all differences once; the seconds, the peak memory in bytes, and the norm of all."""
    importlib.import_module("transformers.models.llama.modeling_llama")  # its time is no part of reading
    torch.set_num_threads(1)
    begun = time.perf_counter()
    total = 0.0
    if way == "streamed":
        update = read_update(base, tuned)
        for name in update:
            total += float(update.dense(name).norm()) ** 2
    else:
        before, after = (loaded(Path(folder)) for folder in (base, tuned))
        for name in list(before):
            total += float((after.pop(name).float() - before.pop(name).float()).norm()) ** 2
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak": peak_memory(), "norm": total**0.5}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def peak_memory() -> int:
    """The most memory that this process had in use, in bytes, mapped pages included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the parent had when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


SMALL = replace(
    Settings(), width=128, inner=256, key_width=64, blocks=2, vocabulary=1000, shard=2**18, rounds=1
)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
