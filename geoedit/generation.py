"""Calls of `generate`: which tokens of the passes inside are the prompt."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.frames import Frame, signature_of


@dataclass(eq=False)
class Generation:
    """One call of `generate`: how long the prompt is, and where the present pass lies in it."""

    batch: int | None
    length: int | None
    ids: Tensor | None
    mask: Tensor | None
    assisted: bool
    prompt_length: int | None = None
    origin: int = 0
    past: int = 0
    consumed: int = 0

    def observe(self, frame: Frame) -> None:
        """Take note of one pass of the generating model, before it runs."""
        if frame.tokens is None:
            return
        if frame.decoder:  # generate was given the encoder's tokens
            self.ids = self.mask = self.length = None
        tokens = frame.tokens[1]
        past = self.consumed if frame.past is None else frame.past
        total = past + tokens
        if self.prompt_length is None:
            if self.length is None:
                self.prompt_length = total
            elif self.assisted:
                self.prompt_length = self.length
            elif past > 0 and total > self.length:
                self.origin, self.prompt_length = total - self.length, self.length
            else:
                self.prompt_length = max(self.length, total)
        self.past = past - self.origin
        self.consumed = total


class Local(threading.local):
    """What one thread knows of the calls of one module."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.last: Frame | None = None
        self.generations: list[Generation] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Local:
        return Local()


def generate_of(module: nn.Module) -> Callable[..., Any] | None:
    """The `generate` of a model's class, or None."""
    found = getattr(type(module), "generate", None)
    return found if callable(found) else None


class Generate:
    """Stands in for a model's `generate`, so that the passes inside know their prompt."""

    def __init__(self, module: nn.Module, of_class: Callable[..., Any], local: Local) -> None:
        self._of_class = of_class
        self._module = weakref.ref(module)  # a strong one would keep a forgotten model alive
        self._before = module.__dict__.get("generate")
        self._local = local
        functools.update_wrapper(self, of_class)
        self.__signature__ = signature_of(of_class)
        module.__dict__["generate"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, and let the passes inside know their prompt."""
        module = self._module()
        if module is None:
            raise EditError("The model of this generate() is gone.")
        generate = self._before or functools.partial(self._of_class, module)
        self._local.generations.append(_read_generation(module, self.__signature__, args, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            self._local.generations.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        """In a copy of the model, the copy's own `generate`."""
        made = copy.copy(self)
        module = self._module()
        if module is not None:
            made._module = weakref.ref(memo.get(id(module), module))
        made._local = copy.deepcopy(self._local, memo)
        return made

    def restore(self) -> None:
        """Put back what was there."""
        module = self._module()
        if module is None:
            return
        if self._before is None:
            module.__dict__.pop("generate", None)
        else:
            module.__dict__["generate"] = self._before


def _read_generation(
    module: nn.Module, signature: inspect.Signature | None, args: tuple, kwargs: dict[str, Any]
) -> Generation:
    names = [
        name for name in (signature.parameters if signature else ()) if name not in ("self", "args", "kwargs")
    ]
    values = {**dict(zip(names, args, strict=False)), **kwargs}

    def option(name: str) -> Any:
        for source in (values.get("generation_config"), getattr(module, "generation_config", None)):
            if values.get(name) is not None:
                return values[name]
            if getattr(source, name, None) is not None:
                return getattr(source, name)
        return None

    _refuse_generation(option)
    if hasattr(getattr(module, "generation_config", None), "disable_compile"):
        kwargs.setdefault("disable_compile", True)  # a compiled forward may leave hooks out
    ids = next(
        (values[name] for name in ("input_ids", "inputs") if isinstance(values.get(name), Tensor)), None
    )
    embeds, mask = values.get("inputs_embeds"), values.get("attention_mask")
    ids = ids if ids is not None and ids.dim() == 2 and not ids.is_floating_point() else None
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    sized = [tensor for tensor in (embeds, ids, mask) if isinstance(tensor, Tensor)]
    assisted = values.get("assistant_model") is not None or option("prompt_lookup_num_tokens") is not None
    return Generation(
        batch=sized[0].shape[0] if sized else None,
        length=max(tensor.shape[1] for tensor in sized) if sized else None,
        ids=ids if embeds is None else None,
        mask=mask,
        assisted=assisted,
    )


def _refuse_generation(option: Callable[[str], Any]) -> None:
    """Refuse the ways to generate in which prompt and new tokens cannot be told apart."""
    guidance = option("guidance_scale")
    refused = {
        "guidance_scale": guidance is not None and guidance != 1,
        "assistant_early_exit": option("assistant_early_exit") is not None,
        "token_healing": bool(option("token_healing")),
        "penalty_alpha": bool(option("penalty_alpha")),
        "custom_generate": isinstance(option("custom_generate"), str),
        "cache_implementation": option("cache_implementation") == "paged",
    }
    for name, found in refused.items():
        if found:
            raise EditError(
                f"generate({name}={option(name)!r}) cannot run with an edit attached: its passes do not tell"
                f" the prompt from the new tokens. Generate without {name}, or remove the edit first."
            )
