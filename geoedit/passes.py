"""What one forward pass is: its tokens, its padding, and how much of the text came before.

A hook inside a model sees a state and nothing else. Which of its tokens are padding, which belong to the
prompt and which were generated is known only to the modules around it, from the arguments that they were
called with. `watch` reads those arguments while a module runs; `resolve` puts them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.frames import Frame, read_frame
from geoedit.generation import Generate, Generation, Local, generate_of


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


class Watch:
    """The calls of one module that are running now; shared by everything that is attached to it."""

    def __init__(self, module: nn.Module) -> None:
        self.users = 0
        self._local = Local()
        self._undo = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True).remove,
            module.register_forward_hook(self._leave, always_call=True).remove,
        ]
        generate = generate_of(module)
        if generate is not None:
            self._undo.append(Generate(module, generate, self._local).restore)

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


def being_watched(module: nn.Module) -> bool:
    """Say whether somebody follows the module: an edit is attached to it, or states are read from it."""
    return module in _watches


def unwatch(module: nn.Module) -> None:
    """Leave; the last to leave takes the hooks out and puts `generate` back."""
    found = _watches[module]
    found.users -= 1
    if found.users == 0:
        del _watches[module]
        found.remove()


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
