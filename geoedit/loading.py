"""Load a model and its tokenizer by a built-in name, a folder or a hub id, with errors that help."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from geoedit.errors import EditError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def load_model(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    A causal or masked language model comes with its head, where the folder says that it has one; anything
    else as the plain encoder. Only safetensors are read, and no code from the folder is run.

    Args:
        name: a built-in testbed ("almanac-gpt2"), a folder that transformers wrote, or a hub id
            ("owner/name").
        dtype: of the weights in memory; None: as stored.
        device: where to put the model.

    Raises:
        EditError: no such folder, a folder without a model or a tokenizer, weights that are not safetensors,
            a hub id that can't be reached, a device that is not there.
    """
    check_device(device)
    from geoedit.testbeds import TESTBEDS, load

    text = str(name)
    if text in TESTBEDS:
        model, tokenizer, _ = load(text, dtype=dtype or torch.float32, device=device)
        return model, tokenizer
    path = Path(name).expanduser()
    if path.exists():
        source = _folder(path)
    else:
        check_hub_id(name, TESTBEDS)
        source = text
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = _loader(config)
        options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype or "auto"}
        options["trust_remote_code"] = False  # a folder may hold code; it is never run
        model, report = loader.from_pretrained(source, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise EditError(f"can't load a model from {text!r}: {_first_line(error)}{_mend(source)}") from error
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise EditError(
            f"{text!r} lacks the weights {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}, "
            "which would be random numbers; save the whole model with model.save_pretrained(folder)."
        )
    if path.exists() and not any(found for pattern in VOCABULARIES for found in path.glob(pattern)):
        raise EditError(
            f"{text!r} has a model, but no tokenizer; save one beside it with "
            "tokenizer.save_pretrained(folder)."
        )
    try:
        found: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EditError(
            f"{text!r} has a model, but no tokenizer that transformers can read: {_first_line(error)} "
            "Save one beside it with tokenizer.save_pretrained(folder)."
        ) from error
    return model.to(device).eval(), found


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name, None for None.

    Raises:
        EditError: an unknown name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise EditError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _folder(path: Path) -> str:
    if not path.is_dir():
        raise EditError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if not (path / "config.json").is_file():
        hint = (
            " It holds an adapter: give the base model's folder."
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise EditError(f"{path} has no config.json, so that it is no transformers model folder.{hint}")
    if not any(path.glob("*.safetensors")):
        other = next(
            (found.name for pattern in ("*.bin", "*.pt", "*.pth") for found in path.glob(pattern)), None
        )
        found = f" It has {other}, which is not read because unpickling can run code;" if other else ""
        raise EditError(
            f"{path} has no safetensors weights.{found} save them with model.save_pretrained(folder)."
        )
    return str(path)


def check_hub_id(name: str | Path, known: tuple[str, ...]) -> None:
    """Refuse what looks like a path that is not there, or like a misspelt built-in model.

    Raises:
        EditError: it can't be a hub id.
    """
    text = str(name)
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~", "\\")) or text.count("/") > 1
    if looks_local or not text.strip():
        raise EditError(
            f"there is no folder {text!r}; check the path, or give a built-in model: {', '.join(known)}."
        )
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.7)
    if close:
        raise EditError(f"there is no model {text!r}; did you mean {close[0]!r}?")


def _loader(config: Any) -> Any:
    architectures = [str(name) for name in getattr(config, "architectures", None) or []]
    if any(name.endswith("ForMaskedLM") for name in architectures):
        return AutoModelForMaskedLM
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    return AutoModelForCausalLM if causal else AutoModel


def check_device(device: torch.device | str) -> None:
    """Refuse a device that is not there.

    Raises:
        EditError: nothing can be put on it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise EditError(f"device {str(device)!r} is not there: {_first_line(error)} Use 'cpu'.") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"its config.json is not JSON ({error})."
    text = str(error).strip().splitlines()
    line = text[0].rstrip(".") if text else type(error).__name__
    return f"{line}."


def _mend(source: str) -> str:
    if Path(source).exists():
        return " Write the folder anew with model.save_pretrained(folder)."
    return (
        " If it is a folder, the path does not exist; if it is a hub id, check its spelling and the network."
    )
