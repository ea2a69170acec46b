"""What a diagnosis needs before it runs: sites, prompts, answers, and all that can be wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from geoedit.activations.inputs import Texts
from geoedit.anatomy import Anatomy
from geoedit.concept import Concept, Prompt
from geoedit.errors import EditError
from geoedit.site import Site

MOST_BLOCKS = 12


def default_sites(known: Anatomy, answered: bool) -> list[Site]:
    """Embedding and blocks' outputs at the value's last token; with answers also at the prompt's last.

    Of more than 12 blocks, 12 are taken evenly from the first to the last.
    """
    blocks = [block.index for block in known.stack().blocks]
    if len(blocks) > MOST_BLOCKS:
        blocks = [blocks[i] for i in np.linspace(0, len(blocks) - 1, MOST_BLOCKS).round().astype(int)]
    found = [] if known.embedding is None else [Site(stream="embedding", token="value")]
    found += [Site(block, "residual_out", "value") for block in blocks]
    return found + ([Site(block, "residual_out", "last") for block in blocks] if answered else [])


def choose_prompts(
    concept: Concept, answered: bool, max_prompts: int, seed: int
) -> tuple[list[Prompt], list[int]]:
    """The prompts of the templates that are used, and which templates these are.

    Templates with answers where there are any and they count; drawn with the seed when they would give more
    prompts than `max_prompts`, at least two of them.

    Raises:
        EditError: fewer than two values, or one sample a class.
    """
    if len(concept.values) < 2:
        raise EditError(
            f"concept {concept.name!r} has one value, {concept.values[0]!r}: there is nowhere to move it; "
            "give two or more."
        )
    wanted = [
        number
        for number, template in enumerate(concept.templates)
        if not answered
        or (template.answers is not None and any(answer is not None for answer in template.answers))
    ]
    each = len(concept.prompts(templates=wanted[:1]))
    room = max(2, max_prompts // each)
    if len(wanted) > room:
        draw = np.random.default_rng(seed).choice(len(wanted), room, replace=False)
        wanted = [wanted[number] for number in np.sort(draw)]
    prompts = concept.prompts(templates=wanted)
    counts = Counter(prompt.value for prompt in prompts)
    lonely = [value for value in concept.values if counts[value] < 2]
    if lonely:
        raise EditError(
            f"concept {concept.name!r}: {lonely[0]!r} has one sample, so that the spread within its class "
            "is unknown; give a second template (or more forms of the value)."
        )
    return prompts, wanted


def answer_groups(
    concept: Concept, prompts: Sequence[Prompt], tokenizer: Any, answered: bool
) -> tuple[list[int], list[int]]:
    """The number of each prompt's answer among all answers (-1: none), and the answers' first token ids.

    Without answers the groups are the values, and there are no ids.
    """
    if not answered:
        return [concept.index(prompt.value) for prompt in prompts], []
    first = [None if prompt.answer is None else prompt.answer_ids(tokenizer)[0] for prompt in prompts]
    ids = list(dict.fromkeys(token for token in first if token is not None))
    numbers = {token: number for number, token in enumerate(ids)}
    return [-1 if token is None else numbers[token] for token in first], ids


def check_answer_places(source: Texts, tokenizer: Any, known: Anatomy) -> None:
    """Raise where the answer would be read after an end token, or in a masked model with nothing masked.

    Raises:
        EditError: naming the prompt.
    """
    special, mask = set(tokenizer.all_special_ids), getattr(tokenizer, "mask_token_id", None)
    for text, ids in zip(source.texts, source.ids, strict=True):
        if mask is not None and mask in ids:
            continue
        if not known.stack().causal:
            raise EditError(
                f"{text!r} has no mask token ({getattr(tokenizer, 'mask_token', None)}), and the model reads "
                "both ways, so that no place is left for the answer: put the mask token into the template."
            )
        if ids[-1] in special:
            raise EditError(
                f"{text!r} ends in the special token {tokenizer.decode([ids[-1]])!r}, after which no answer "
                "stands: use the tokenizer without an end token (add_eos_token=False)."
            )


def checked_scales(scale: float | Sequence[float]) -> tuple[float, ...]:
    """The scales as a tuple.

    Raises:
        EditError: none, or one that is not a finite number other than zero.
    """
    found = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    if not found:
        raise EditError("scale is empty; give a number, such as 1.0, or several.")
    for entry in found:
        if not np.isfinite(entry) or entry == 0:
            raise EditError(
                f"scale is {entry}; it must be a finite number other than 0, which would change nothing."
            )
    return tuple(float(entry) for entry in found)


def check_counts(**counts: int) -> None:
    """Raise unless every number is at least one.

    Raises:
        EditError: naming the argument.
    """
    for name, count in counts.items():
        if count < 1:
            raise EditError(f"{name} is {count}; it must be at least 1.")
