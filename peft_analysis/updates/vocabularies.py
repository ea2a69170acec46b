"""Whether a row of two embeddings means the same token, told by the tokenizers beside the weights."""

from pathlib import Path
from typing import Any

from peft_analysis.errors import UpdateError
from peft_analysis.updates.files import read_json

TOKENIZER = "tokenizer.json"
MOST = 0.01  # of the rows in common: a few tokens may have been renamed, as reserved ones are


def check_vocabularies(base: str, tuned: str, rows: int) -> None:
    """Compares two models' tokens over the rows that both have; not where either has no tokenizer.

    Args:
        base: the folder of the base, or anything else that it was read from.
        tuned: that of the tuned model.
        rows: how many rows their embeddings have in common.

    Raises:
        UpdateError: more than one in a hundred ids is another token.
    """
    first, second = Path(base) / TOKENIZER, Path(tuned) / TOKENIZER
    if not (first.is_file() and second.is_file()) or first.read_bytes() == second.read_bytes():
        return
    ours, theirs = _tokens(first), _tokens(second)
    common = [number for number in ours.keys() & theirs.keys() if number < rows]
    other = [number for number in sorted(common) if ours[number] != theirs[number]]
    if len(other) > MOST * len(common):
        number = other[0]
        raise UpdateError(
            f"{tuned} and {base} have other vocabularies: {len(other)} of {len(common)} tokens differ, "
            f"the first is {number}: {theirs[number]!r}, in the base {ours[number]!r}. Rows of embeddings "
            "cannot be compared; leave them out with without="
        )


def _tokens(path: Path) -> dict[int, str]:
    """The token of each id."""
    content = read_json(path)
    try:
        vocabulary: Any = content["model"].get("vocab", {})
        added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens", [])}
        if isinstance(vocabulary, dict):
            return {**{int(number): str(token) for token, number in vocabulary.items()}, **added}
        return {**{number: str(pair[0]) for number, pair in enumerate(vocabulary)}, **added}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as broken:
        raise UpdateError(f"{path} is no tokenizer of the tokenizers library ({broken!r})") from broken
