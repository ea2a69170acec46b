"""What one forward pass is: its tokens, its padding, and how much of the text came before.

A hook inside a model sees a state and nothing else. Which of its tokens are padding, which belong to the
prompt and which were generated is known only to the modules around it, from the arguments that they were
called with. `watch` reads those arguments while a module runs; `resolve` puts them together.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError

_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
_OTHER_INPUTS = ("pixel_values", "input_values", "input_features")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_PACKED = ("cu_seq_lens_q", "cu_seqlens")


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass, as a site inside it needs to know it.

    Attributes:
        input_ids: Token ids (batch, tokens) of this pass; None when the model was given embeddings or pixels.
        attention_mask: (batch, tokens), true at the real tokens of this pass.
        past_length: Number of positions before this pass (in the cache).
        prompt_length: Positions below it are the prompt, the others were generated.
        generating: Whether the model's `generate` is running.
        prompt_ids: Ids (batch, prompt_length) of the whole prompt, if this pass holds a part of it.
        prompt_mask: (batch, prompt_length), true at its real tokens, if this pass holds a part of it.
        expansion: Rows of this pass for one row given to `generate` (beams or returned sequences).
    """

    input_ids: Tensor | None
    attention_mask: Tensor
    past_length: int = 0
    prompt_length: int = 0
    generating: bool = False
    prompt_ids: Tensor | None = None
    prompt_mask: Tensor | None = None
    expansion: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        batch, tokens = self.attention_mask.shape
        return batch, tokens


@dataclass(eq=False)
class Frame:
    """What one running module was called with, as far as it tells tokens from each other."""

    entry: bool
    tokens: tuple[int, int] | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    past: int | None = 0
    keep: int | None = None
    decoder: bool = False
    grad: bool = False


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


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.last: Frame | None = None
        self.generations: list[Generation] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()


class Watch:
    """The calls of one module that are running now; shared by everything that is attached to it."""

    def __init__(self, module: nn.Module) -> None:
        self.users = 0
        self._local = _Local()
        self._undo = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True).remove,
            module.register_forward_hook(self._leave, always_call=True).remove,
        ]
        if callable(getattr(type(module), "generate", None)):
            self._undo.append(_Generate(module, self._local).restore)

    @property
    def running(self) -> Frame | None:
        """The innermost call that has not returned."""
        return self._local.frames[-1] if self._local.frames else None

    @property
    def latest(self) -> Frame | None:
        """The call that is running, or else the one that ended last."""
        return self.running or self._local.last

    @property
    def generation(self) -> Generation | None:
        """The call of `generate` that is running."""
        return self._local.generations[-1] if self._local.generations else None

    def remove(self) -> None:
        """Take the hooks out and put `generate` back."""
        while self._undo:
            self._undo.pop()()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = read_frame(module, args, kwargs)
        if self.generation is not None:
            self.generation.observe(frame)
        self._local.frames.append(frame)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._local.frames:
            self._local.last = self._local.frames.pop()


_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(module: nn.Module) -> Watch:
    """Start to follow the calls of a module, and of its `generate`, or join whoever follows them already."""
    found = _watches.get(module)
    if found is None:
        found = _watches[module] = Watch(module)
    found.users += 1
    return found


def unwatch(module: nn.Module) -> None:
    """Leave; the last to leave takes the hooks out and puts `generate` back."""
    found = _watches[module]
    found.users -= 1
    if found.users == 0:
        del _watches[module]
        found.remove()


@functools.lru_cache(maxsize=512)
def _signature(forward: Callable) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def _bind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], AbstractSet[str]]:
    """Give the arguments by name, and every name that the module's forward knows."""
    forward = module.__dict__.get("forward") or type(module).forward
    bound_already = "forward" in module.__dict__
    signature = _signature(forward)
    if signature is None:
        return kwargs, frozenset(kwargs)
    names = list(signature.parameters)
    if not bound_already:
        names = names[1:]
    positional = [
        name
        for name in names
        if signature.parameters[name].kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(positional, args, strict=False)), **kwargs}, frozenset(names) | kwargs.keys()


def read_frame(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Frame:
    """Read tokens, padding and cache from the arguments of one call.

    Raises:
        EditError: several texts are packed into one row, where no site can tell them apart.
    """
    values, names = _bind(module, args, kwargs)
    if any(values.get(name) is not None for name in _PACKED):
        raise EditError(
            f"{type(module).__name__} was called with texts packed into one row (cu_seq_lens), as by"
            " continuous batching: a site cannot tell them apart. Pad them to one row a text instead."
        )
    decoder = not names.isdisjoint(_DECODER_TOKENS)
    ids_name, embeds_name = _DECODER_TOKENS if decoder else _TOKENS
    ids, embeds = values.get(ids_name), values.get(embeds_name)
    frame = Frame(entry=not names.isdisjoint((*_TOKENS, *_DECODER_TOKENS, *_OTHER_INPUTS)), decoder=decoder)
    if isinstance(ids, Tensor) and ids.dim() == 2:
        frame.ids, frame.tokens = ids, (ids.shape[0], ids.shape[1])
    elif isinstance(embeds, Tensor) and embeds.dim() == 3:
        frame.tokens = (embeds.shape[0], embeds.shape[1])
    mask = values.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    frame.mask = mask if isinstance(mask, Tensor) else None
    frame.past = _past(values)
    keep = values.get("logits_to_keep")
    frame.keep = keep if isinstance(keep, int) and keep > 0 else None
    frame.grad = torch.is_grad_enabled()
    return frame


def _past(values: dict[str, Any]) -> int | None:
    """Positions in the cache; None for a cache that has seen tokens but does not count them."""
    cache = next((values[name] for name in _CACHES if values.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except (ValueError, AttributeError, NotImplementedError):
            return None
    if isinstance(cache, (tuple, list)):
        while isinstance(cache, (tuple, list)):
            if not cache:
                return 0
            cache = cache[0]
        return int(cache.shape[-2]) if isinstance(cache, Tensor) and cache.dim() >= 2 else None
    return None


def _generate_of(module: nn.Module) -> Callable[..., Any]:
    """The `generate` of a model's class, or None."""
    return getattr(type(module), "generate", None)  # type: ignore[return-value]


class _Generate:
    """Stands in for a model's `generate`, so that the passes inside know their prompt."""

    def __init__(self, module: nn.Module, local: _Local) -> None:
        self._module = weakref.ref(module)  # a strong one would keep a forgotten model alive
        self._before = module.__dict__.get("generate")
        self._local = local
        functools.update_wrapper(self, _generate_of(module))
        self.__signature__ = _signature(_generate_of(module))
        module.__dict__["generate"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None:
            raise EditError("The model of this generate() is gone.")
        generate = self._before or functools.partial(_generate_of(module), module)
        self._local.generations.append(_read_generation(module, args, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            self._local.generations.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
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


def _read_generation(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Generation:
    signature = _signature(_generate_of(module))
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


def resolve(watches: Sequence[Watch], own: Watch, states: Tensor) -> Pass:
    """Put together what is known about the pass that states (batch, tokens, width) belong to.

    Args:
        watches: The modules around the site's module, outermost first.
        own: The site's module itself.
        states: The states at the site.

    Raises:
        EditError: the state has other tokens than the pass.
    """
    batch, tokens = states.shape[:2]
    around = (*(found.running for found in watches), own.latest)
    active = [frame for frame in around if frame is not None]
    entries = _entries(active)
    shape = next((frame.tokens for frame in entries if frame.tokens is not None), (batch, tokens))
    length, keep = shape[1], next((frame.keep for frame in entries if frame.keep is not None), None)
    if shape != (batch, tokens) and not (shape[0] == batch and keep == tokens < length):
        raise EditError(
            f"The state has (batch, tokens) = {(batch, tokens)}, but the model was called with {shape}:"
            " this module does not keep one state a token. Choose a site that does."
        )
    known = [frame for frame in entries if frame.tokens == shape]
    ids = next((f.ids for i, f in enumerate(known) if f.ids is not None and (i == 0 or not f.decoder)), None)
    generation = _generation_of(watches, own, shape if known else None)
    if generation is not None:
        past = generation.past
        prompt_length = generation.prompt_length or 0
    else:
        pasts = [1 if frame.past is None else frame.past for frame in known]
        past = min(pasts, default=0)
        prompt_length = past if past else length
    real = _real_tokens(active, shape, generation, states.device)
    found = Pass(ids, real[:, -length:], past, prompt_length, generation is not None)
    found = _with_prompt(found, real, generation)
    return found if tokens == length else _tail(found, tokens)


def _real_tokens(
    active: Sequence[Frame], shape: tuple[int, int], generation: Generation | None, device: torch.device
) -> Tensor:
    """Give the mask of real tokens (batch, at least tokens), the present pass at its end."""
    batch, tokens = shape
    for frame in reversed(active):
        mask = frame.mask
        if mask is None or mask.dim() != 2 or mask.shape[0] != batch:
            continue
        fits = mask.shape[1] == tokens
        if frame.tokens == shape:
            fits = (
                fits or mask.shape[1] >= tokens
                if frame.past is None
                else mask.shape[1] == frame.past + tokens
            )
        if fits:
            return mask.to(device).bool()
    if generation is not None and generation.mask is not None:
        prompt = _spread(generation.mask.to(device), batch, generation)
        more = generation.past + tokens - prompt.shape[1]
        return torch.cat([prompt, prompt.new_ones(batch, max(more, 0))], 1)[:, : generation.past + tokens]
    for frame in active:
        if frame.mask is not None and frame.mask.dim() == 4 and frame.mask.shape[0] in (1, batch):
            return _seeing_themselves(frame.mask, tokens, frame.past or 0).to(device).expand(batch, -1)
    return torch.ones(shape, dtype=torch.bool, device=device)


def _seeing_themselves(mask: Tensor, tokens: int, past: int) -> Tensor:
    """In a mask (batch, heads, queries, keys), true or 0 where a query sees a key, the diagonal."""
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    start = past if mask.shape[-1] >= past + tokens else mask.shape[-1] - tokens
    window = mask[:, :, -tokens:, start : start + tokens].bool()
    return window.diagonal(dim1=-2, dim2=-1).any(1)


def _spread(rows: Tensor, batch: int, generation: Generation) -> Tensor:
    """Repeat what `generate` was given for each row, for the rows of a pass (beams, returned sequences)."""
    return rows.repeat_interleave(batch // rows.shape[0], 0) if batch % rows.shape[0] == 0 else rows


def _with_prompt(found: Pass, real: Tensor, generation: Generation | None) -> Pass:
    (batch, tokens), prompt_length = found.shape, found.prompt_length
    expansion = 1
    if generation is not None and generation.batch and batch % generation.batch == 0:
        expansion = batch // generation.batch
    if found.past_length >= prompt_length:
        return replace(found, expansion=expansion)
    if found.past_length == 0 and tokens >= prompt_length:
        ids = None if found.input_ids is None else found.input_ids[:, :prompt_length]
        return replace(
            found, expansion=expansion, prompt_ids=ids, prompt_mask=found.attention_mask[:, :prompt_length]
        )
    ids, mask = None, real[:, :prompt_length]
    if generation is not None and generation.ids is not None and generation.ids.shape[1] == prompt_length:
        ids = _spread(generation.ids.to(real.device), batch, generation)
    if generation is not None and generation.mask is not None:
        mask = _spread(generation.mask.to(real.device), batch, generation)
    mask = torch.cat([mask, mask.new_ones(batch, prompt_length - mask.shape[1])], 1)
    return replace(found, expansion=expansion, prompt_ids=ids, prompt_mask=mask)


def _tail(found: Pass, tokens: int) -> Pass:
    """The last tokens of a pass, for modules after the model has dropped the others (logits_to_keep)."""
    ids = None if found.input_ids is None else found.input_ids[:, -tokens:]
    dropped = found.shape[1] - tokens
    return replace(
        found,
        input_ids=ids,
        attention_mask=found.attention_mask[:, -tokens:],
        past_length=found.past_length + dropped,
    )


def _entries(active: Sequence[Frame]) -> list[Frame]:
    """The calls that were given tokens, innermost first, up to one that was given something else."""
    entries = []
    for frame in reversed(active):
        if frame.entry:
            entries.append(frame)
            if frame.tokens is None and frame.ids is None and not frame.decoder:
                break
    return entries


def _generation_of(watches: Sequence[Watch], own: Watch, shape: tuple[int, int] | None) -> Generation | None:
    for found in (own, *reversed(watches)):
        if found.generation is not None:
            frame = found.latest if found is own else found.running
            inside = frame is not None and (frame.tokens is None or frame.tokens == shape)
            return found.generation if inside else None
    return None
