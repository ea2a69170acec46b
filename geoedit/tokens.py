"""Which tokens of a pass a site means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import TokenChooser

Phase = Literal["prompt", "new", "both"]
PHASES = ("prompt", "new", "both")
ValueIds = tuple[tuple[int, ...], ...]


def check_phase(phase: str, token: str | int | TokenChooser) -> None:
    """Refuse a phase that does not exist, or in which the token can never be.

    Raises:
        EditError: the phase is unknown, or it is "new" and the token lies in the prompt by its nature.
    """
    if phase not in PHASES:
        raise EditError(f"phase={phase!r}: the phases are {', '.join(PHASES)}.")
    if phase == "new" and token not in ("last", "all"):
        raise EditError(
            f"phase='new' with token={token!r}: values, positions and callables select tokens of the prompt"
            " only; new tokens are selected by 'last' or 'all', which then both mean each of them."
        )


def select(
    this_pass: Pass,
    token: str | int | TokenChooser,
    *,
    phase: str = "both",
    value_ids: Sequence[Sequence[int]] | None = None,
    positions: Tensor | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens of a pass that a site means.

    Of the prompt, the tokens that the site names; of the generated tokens ("last" and "all" only) each one.
    Without `generate`, a pass that starts from an empty cache is a prompt, one that continues a cache is new.

    Args:
        this_pass: The pass.
        token: The site's token.
        phase: "prompt", "new" or "both".
        value_ids: For token "value": the ways to spell the values in ids.
        positions: Positions (batch,) in the padded prompt, or a mask (batch, prompt tokens), not the token.

    Raises:
        EditError: a row has no such token.
    """
    tokens = this_pass.shape[1]
    before = max(min(this_pass.prompt_length - this_pass.past_length, tokens), 0)
    real = this_pass.attention_mask
    prompt = torch.zeros_like(real[:, :before])
    if before and phase != "new":
        chosen = _in_prompt(this_pass, token, value_ids, positions)
        prompt = chosen[:, this_pass.past_length : this_pass.past_length + before].to(real.device)
    new = real[:, before:]
    if phase == "prompt" or positions is not None or token not in ("last", "all"):
        new = torch.zeros_like(new)
    return torch.cat([prompt, new], 1)


def _in_prompt(
    this_pass: Pass,
    token: str | int | TokenChooser,
    value_ids: Sequence[Sequence[int]] | None,
    positions: Tensor | None,
) -> Tensor:
    real = this_pass.prompt_mask
    if real is None:
        raise EditError(
            "The padding of the prompt is not known in this pass, so no token of it can be selected."
        )
    batch, tokens = real.shape
    if positions is not None:
        return as_mask(positions.to(real.device), batch, tokens) & real
    if token == "all":
        return real
    if token == "last":
        return real & (_count_from_end(real) == 1)
    if isinstance(token, int):
        return _at_index(real, token)
    if this_pass.prompt_ids is None:
        raise EditError(
            f"token={token!r} needs the token ids, but the model was given embeddings, pixels or sounds;"
            " use 'last', 'all' or an integer."
        )
    ids = this_pass.prompt_ids.to(real.device)
    if callable(token):
        chosen = token(ids, real)
        if not isinstance(chosen, Tensor):
            raise EditError(f"The token callable returned {type(chosen).__name__}; expected a tensor.")
        return as_mask(chosen.to(real.device), batch, tokens)
    if not value_ids:
        raise EditError(
            "token='value' needs to know how the values are spelled in ids: give value_ids, for instance"
            " spellings(tokenizer, values)."
        )
    return find_values(ids, real, value_ids)


def _count_from_end(real: Tensor) -> Tensor:
    return real.flip(1).long().cumsum(1).flip(1)


def _at_index(real: Tensor, index: int) -> Tensor:
    counted = real.long().cumsum(1) - 1 if index >= 0 else -_count_from_end(real)
    chosen = real & (counted == index)
    missing = ~chosen.any(1)
    if bool(missing.any()):
        row = int(missing.long().argmax())
        raise EditError(
            f"token={index} does not exist in row {row} of the batch, which has"
            f" {int(real[row].sum())} real tokens."
        )
    return chosen


def find_values(
    input_ids: Tensor, real: Tensor, value_ids: Sequence[Sequence[int]]
) -> Bool[Tensor, "batch tokens"]:
    """Mark, in each row, the last token of the value that occurs last.

    Args:
        input_ids: (batch, tokens).
        real: (batch, tokens), true at real tokens; a value must lie within them.
        value_ids: The ways to spell the values in ids.

    Raises:
        EditError: a row holds no value.
    """
    tokens = input_ids.shape[1]
    ends = torch.zeros_like(real)
    for spelling in value_ids:
        size = len(spelling)
        if size > tokens:
            continue
        wanted = torch.tensor(spelling, device=input_ids.device)
        windows = (input_ids.unfold(1, size, 1) == wanted).all(-1) & real.unfold(1, size, 1).all(-1)
        ends = ends | torch.cat([torch.zeros_like(real[:, : size - 1]), windows], 1)
    missing = ~ends.any(1)
    if bool(missing.any()):
        row = int(missing.long().argmax())
        raise EditError(
            f"Row {row} of the batch holds none of the {len(value_ids)} spellings of the values:"
            f" ids {input_ids[row][real[row]].tolist()}. Give a prompt with a value, or another token."
        )
    return ends & (_count_from_end(ends) == 1)


def spellings(tokenizer: Any, values: Iterable[str]) -> ValueIds:
    """Give every way in which values are spelled in ids: at the start of a text and after a space.

    Args:
        tokenizer: A Hugging Face tokenizer.
        values: The values, as texts.

    Raises:
        EditError: a value becomes no token at all.
    """
    found: list[tuple[int, ...]] = []
    for value in values:
        ways = [
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (value, f" {value}")
        ]
        if not ways[0]:
            raise EditError(
                f"The value {value!r} becomes no token; give values that the tokenizer can spell."
            )
        found.extend(way for way in ways if way and way not in found)
    return tuple(found)


def as_mask(positions: Tensor, batch: int, tokens: int) -> Tensor:
    """Turn positions (batch,) or a bool mask (batch, tokens) into a bool mask (batch, tokens).

    Raises:
        EditError: the shape is neither, or a position lies outside the row.
    """
    if positions.dtype == torch.bool:
        if positions.shape != (batch, tokens):
            raise EditError(
                f"A token mask has shape {tuple(positions.shape)},"
                f" but this pass has (batch, tokens) = {(batch, tokens)}."
            )
        return positions
    if positions.is_floating_point() or positions.shape != (batch,):
        raise EditError(
            f"Token positions have shape {tuple(positions.shape)} and dtype {positions.dtype};"
            f" expected integers of shape ({batch},), one a row, or a bool mask of shape {(batch, tokens)}."
        )
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= tokens):
        raise EditError(
            f"Token positions {positions.tolist()} leave the row of {tokens} tokens;"
            " they count from 0 over the padded row."
        )
    return torch.arange(tokens, device=positions.device)[None, :] == positions[:, None]
