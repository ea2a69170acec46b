"""What a model is fed: prompts or ready tensors, all checked before the first forward, then batched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from geoedit.activations.calls import accepted_arguments
from geoedit.concept import Prompt
from geoedit.errors import EditError
from geoedit.site import Site
from geoedit.spans import tokens_in_span

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Some prompts as one call of the model.

    Attributes:
        indices: place of each row among the prompts.
        inputs: keyword arguments of the model's forward.
        value: place of the value's last token in each (padded) row, where known.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]
    value: Int[Tensor, " batch"] | None = None


def positions_of(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Positions counted from 0 over the real tokens of each row (0 at padding on the left)."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@dataclass(frozen=True)
class Texts:
    """Prompts with their tokens.

    Attributes:
        ids: token ids of each prompt, special tokens included.
        value_tokens: place of the value's last token in each prompt; None where it is not known.
        side: where padding goes.
        positions: whether the model is given position_ids.
    """

    texts: tuple[str, ...]
    values: tuple[str | None, ...]
    ids: tuple[tuple[int, ...], ...]
    value_tokens: tuple[int, ...] | None
    pad: int
    side: Side
    positions: bool = False
    decoder_start: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each prompt."""
        return tuple(map(len, self.ids))

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.ids)

    def name(self, index: int) -> str:
        """Words for one prompt, for an error."""
        return f"prompt {index} ({self.texts[index]!r})"

    def check(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Raise unless every site's token exists in every prompt.

        Raises:
            EditError: a site at the value where the prompts name no value; an index past the end of a prompt.
        """
        for site in sites:
            if site.token == "value" and self.value_tokens is None:
                if None not in self.values:
                    raise EditError(
                        f"the site {site} reads the token of the value, but this tokenizer does not say "
                        "which "
                        "characters a token covers; load the fast tokenizer of this model."
                    )
                raise EditError(
                    f"the site {site} reads the token of the value, but the prompts do not say which value "
                    "they "
                    "hold: pass concept.prompts(), or values=[…] with one text for each prompt."
                )
            if isinstance(site.token, int) and self.decoder_start is None:
                for index, length in enumerate(self.lengths):
                    if not -length <= site.token < length:
                        raise EditError(
                            f"{self.name(index)} has {length} tokens, so the site {site} has none to read "
                            "there; "
                            "choose a token that every prompt has, or leave the prompt out."
                        )

    def batch(self, indices: Sequence[int]) -> Batch:
        """These prompts as one call, padded to the longest of them."""
        rows = [self.ids[i] for i in indices]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        starts = torch.tensor([width - len(row) if self.side == "left" else 0 for row in rows])
        for place, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
            ids[place, start : start + len(row)] = torch.tensor(row)
            mask[place, start : start + len(row)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            inputs["position_ids"] = positions_of(mask.bool())
        if self.decoder_start is not None:
            inputs["decoder_input_ids"] = torch.full((len(rows), 1), self.decoder_start)
        value = None
        if self.value_tokens is not None:
            value = starts + torch.tensor([self.value_tokens[i] for i in indices])
        return Batch(tuple(indices), inputs, value)


@dataclass(frozen=True)
class Tensors:
    """Ready inputs of a model (pixels, ids, masks): a mapping of tensors with one row for each input."""

    inputs: Mapping[str, Tensor]
    values: tuple[str | None, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Names for the inputs, which have no text."""
        return tuple(f"input {index}" for index in range(len(self)))

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Unknown: whoever made the tensors has padded them."""
        return None

    def __len__(self) -> int:
        """How many inputs there are."""
        return len(self.values)

    def name(self, index: int) -> str:
        """Words for one input, for an error."""
        return f"input {index}"

    def check(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Raise if a site needs text.

        Raises:
            EditError: a site at the token of a value.
        """
        for site in sites:
            if site.token == "value":
                raise EditError(
                    f"the site {site} reads the token of a value, but ready tensors have no text to look "
                    "for it; "
                    "pass prompts and a tokenizer, or a callable token that returns the positions."
                )

    def batch(self, indices: Sequence[int]) -> Batch:
        """These rows as one call."""
        chosen = torch.as_tensor(list(indices))
        return Batch(
            tuple(indices), {name: part[chosen.to(part.device)] for name, part in self.inputs.items()}
        )


def read_inputs(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Prompt] | Mapping[str, Tensor],
    values: Sequence[str] | None = None,
) -> Texts | Tensors:
    """Prompts or ready tensors as a checked source of batches.

    Raises:
        EditError: no prompts, an empty prompt, one without tokens or too long for the model, a value that is
            not in its prompt, values of another number, tensors of unequal rows, a missing tokenizer.
    """
    if isinstance(prompts, Mapping):
        return _read_tensors(prompts, values)
    if not isinstance(prompts, (str, Sequence)):
        prompts = tuple(prompts)  # a generator, say
    if isinstance(prompts, str) or len(prompts) == 0:
        raise EditError(f"prompts is {prompts!r}: give a list with at least one text or concept.Prompt.")
    if tokenizer is None:
        raise EditError("prompts need a tokenizer; without one, pass a mapping of ready tensors instead.")
    texts, names, spans = _texts_and_spans(prompts, values)
    offsets_known = bool(getattr(tokenizer, "is_fast", False))
    encoded = [_encode(tokenizer, text, offsets_known) for text in texts]
    limit = _longest(model, tokenizer)
    for index, (text, (ids, _)) in enumerate(zip(texts, encoded, strict=True)):
        if not text.strip() or not ids:
            raise EditError(f"prompt {index} ({text!r}) is empty or has no tokens; leave it out.")
        if limit is not None and len(ids) > limit:
            raise EditError(
                f"prompt {index} ({text[:60]!r}…) has {len(ids)} tokens, more than the {limit} that the "
                "model takes; "
                "shorten it: nothing is cut off in silence."
            )
    return Texts(
        texts=tuple(texts),
        values=tuple(names),
        ids=tuple(ids for ids, _ in encoded),
        value_tokens=_value_tokens(tokenizer, texts, names, spans, [offsets for _, offsets in encoded]),
        pad=_pad(tokenizer),
        side="left" if getattr(tokenizer, "padding_side", "right") == "left" else "right",
        decoder_start=_decoder_start(model),
    )


def _read_tensors(inputs: Mapping[str, Tensor], values: Sequence[str] | None) -> Tensors:
    sizes = {name: part.shape[0] if part.dim() else 0 for name, part in inputs.items()}
    if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise EditError(
            f"ready inputs need the same number of rows, at least one, in every tensor; found {sizes}."
        )
    count = next(iter(sizes.values()))
    if values is not None and len(values) != count:
        raise EditError(f"there are {len(values)} values for {count} inputs; give one for each.")
    return Tensors(dict(inputs), (None,) * count if values is None else tuple(values))


def _texts_and_spans(
    prompts: Sequence[str] | Sequence[Prompt], values: Sequence[str] | None
) -> tuple[list[str], list[str | None], list[tuple[int, int] | None]]:
    if values is not None and len(values) != len(prompts):
        raise EditError(f"there are {len(values)} values for {len(prompts)} prompts; give one for each.")
    texts: list[str] = []
    names: list[str | None] = []
    spans: list[tuple[int, int] | None] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, Prompt):
            if values is not None:
                raise EditError("values= goes with plain texts; a concept.Prompt names its value itself.")
            texts.append(prompt.text)
            names.append(prompt.value)
            spans.append(prompt.span or find_value(prompt.text, prompt.value, index))
            start, end = spans[-1] or (0, 0)
            if not 0 <= start < end <= len(prompt.text):
                raise EditError(
                    f"prompt {index} ({prompt.text!r}) says that its value stands at the characters "
                    f"{prompt.span}; "
                    f"the text has {len(prompt.text)}."
                )
        elif isinstance(prompt, str):
            texts.append(prompt)
            names.append(None if values is None else values[index])
            spans.append(None if values is None else find_value(prompt, values[index], index))
        else:
            raise EditError(
                f"prompt {index} is a {type(prompt).__name__}; prompts are texts or concept.Prompt."
            )
    return texts, names, spans


def find_value(text: str, value: str, index: int = 0) -> tuple[int, int]:
    """Characters of the last place where a value stands in a text, as whole words where it does so at all.

    Raises:
        EditError: the text does not hold the value.
    """
    whole = list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text)) if value else []
    if whole:
        return whole[-1].span()
    start = text.rfind(value) if value else -1
    if start < 0:
        raise EditError(
            f"prompt {index} ({text!r}) does not hold its value {value!r}; mend the value, or pass a "
            "concept.Prompt whose span says where it stands."
        )
    return start, start + len(value)


def _encode(tokenizer: Any, text: str, offsets: bool) -> tuple[tuple[int, ...], list[tuple[int, int]] | None]:
    options = {"return_offsets_mapping": True} if offsets else {}
    encoded = tokenizer(text, truncation=False, padding=False, **options)
    pairs = [(int(start), int(end)) for start, end in encoded["offset_mapping"]] if offsets else None
    return tuple(encoded["input_ids"]), pairs


def _value_tokens(
    tokenizer: Any,
    texts: Sequence[str],
    values: Sequence[str | None],
    spans: Sequence[tuple[int, int] | None],
    offsets: Sequence[list[tuple[int, int]] | None],
) -> tuple[int, ...] | None:
    """Place of the last token of each value; None where values or offsets are not known."""
    places = []
    for index, (text, value, span, pairs) in enumerate(zip(texts, values, spans, offsets, strict=True)):
        if span is None or pairs is None:
            return None
        found = tokens_in_span(pairs, span)
        if not found:
            raise EditError(
                f"prompt {index} ({text!r}): the value {value!r} has no token of {type(tokenizer).__name__}; "
                "write it in words that the tokenizer keeps."
            )
        places.append(found[-1])
    return tuple(places)


def _pad(tokenizer: Any) -> int:
    """The padding id; where there is none, another token may stand there, because the mask hides it."""
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0


def _longest(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that model and tokenizer say they take; None when neither says."""
    config = getattr(model, "config", None)
    said = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    known = [int(number) for number in said if isinstance(number, int | float) and 0 < number < 1e9]
    return min(known, default=None)


def _decoder_start(model: nn.Module) -> int | None:
    """The token that opens the decoder of an encoder-decoder model; None for other models."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    if "decoder_input_ids" not in accepted_arguments(model):
        return None
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise EditError(
        f"{type(model).__name__} has a decoder, but its config names no decoder_start_token_id; set it, or "
        "pass ready "
        "tensors with decoder_input_ids."
    )
