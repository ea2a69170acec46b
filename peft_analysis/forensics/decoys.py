"""Names that nobody edited, as like the candidates as can be: what a candidate must stand out from."""

from collections.abc import Sequence
from typing import Any

import torch

from peft_analysis.errors import UpdateError

FEWEST = 20
"""Fewer decoys than these tell nothing of a tail."""


def decoys(subjects: Sequence[str], tokenizer: Any, count: int, generator: torch.Generator) -> list[str]:
    """Names that are no candidates: beginnings of some candidates with the ends of others.

    Candidates of one word, and those that cannot be put together to anything new, get a word of the
    tokenizer's vocabulary in the place of their last word.

    Raises:
        UpdateError: fewer than 20 names come about.
    """
    words = [subject.split() for subject in subjects]
    vocabulary = _words(tokenizer)
    known = {" ".join(parts) for parts in words}
    found: list[str] = []

    def draw(size: int) -> int:
        return int(torch.randint(size, (1,), generator=generator, device=generator.device))

    for attempt in range(50 * count):
        if len(found) == count:
            break
        first, second = words[draw(len(words))], words[draw(len(words))]
        if len(first) > 1 and len(second) > 1 and attempt < 25 * count:
            cut = 1 + draw(len(first) - 1)
            name = " ".join([*first[:cut], *second[1 + draw(len(second) - 1) :]])
        elif vocabulary:
            name = " ".join([*first[:-1], vocabulary[draw(len(vocabulary))]])
        else:
            continue
        if name not in known:
            known.add(name)
            found.append(name)
    if len(found) < FEWEST:
        raise UpdateError(
            f"only {len(found)} decoys come from {len(subjects)} candidates and the tokenizer's words; "
            f"at least {FEWEST} are needed: give names that nobody edited, decoys=[…]"
        )
    return found


def _words(tokenizer: Any) -> list[str]:
    """Whole words of the vocabulary, in its order."""
    if not hasattr(tokenizer, "get_vocab"):
        return []
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    marked = any(token.startswith(("Ġ", "▁")) for token, _ in tokens)
    found = []
    for token, _ in tokens:
        word = token.lstrip("Ġ▁")
        if word.isalpha() and (not marked or (token != word and len(word) > 2)):
            found.append(word)
    return found
