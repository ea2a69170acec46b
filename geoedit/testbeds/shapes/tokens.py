"""The tokenizer of the shapes pipelines: CLIP's, with one token for each word of the world."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from geoedit.testbeds.shapes.world import vocabulary

LENGTH = 20
"""Tokens of a padded caption, the begin and end tokens among them."""


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make each word of the world one token; other text goes by bytes."""
    words = sorted(vocabulary(), key=lambda word: (-len(word), word))
    while True:
        tokenizer = _from_words(words)
        torn = [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) > 1]
        if not torn:
            return tokenizer
        words = [*torn, *(word for word in words if word not in torn)]  # an earlier word's merges come first


def _from_words(words: list[str]) -> CLIPTokenizer:
    """Merges that put each word together from its left end, the first word's before the second's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            if (left, piece) not in merges:
                merges.append((left, piece))
                pieces.append(left + piece)
            left += piece
    pairs: Any = merges  # the annotation of transformers knows merges as text only
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), *special])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
