"""Which tokens of a text cover a span of its characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geoedit.errors import EditError


def tokens_in_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Places of the tokens that share at least one character with a span of the text.

    Args:
        offsets: for each token the half-open range of characters that it covers; (0, 0) for special tokens.
        span: half-open range of characters.
    """
    return [i for i, (start, end) in enumerate(offsets) if max(start, span[0]) < min(end, span[1])]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the half-open range of characters that each covers, without special tokens.

    Raises:
        EditError: the tokenizer can't tell (a slow one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise EditError(
            f"{type(tokenizer).__name__} does not say which characters a token covers; load the fast "
            "tokenizer of this model (AutoTokenizer.from_pretrained with a tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
