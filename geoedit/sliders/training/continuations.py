"""A causal language model asked row by row: what follows prompts is drawn from it, and scored by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoedit.errors import EditError
from geoedit.sliders.training.trajectories import uniform


@dataclass(frozen=True)
class Rows:
    """Token rows padded on the right, and how many tokens of each count."""

    ids: Int[Tensor, "rows tokens"]
    lengths: Int[Tensor, " rows"]

    def followed(self, drawn: Int[Tensor, "rows count"]) -> Rows:
        """Each row with its continuation behind it."""
        ids = functional.pad(self.ids, (0, drawn.shape[1]))
        places = self.lengths[:, None] + torch.arange(drawn.shape[1], device=ids.device)
        return Rows(ids.scatter(1, places, drawn), self.lengths + drawn.shape[1])

    def take(self, index: Int[Tensor, " some"]) -> Rows:
        """Some rows; they may be repeated."""
        return Rows(self.ids[index], self.lengths[index])


@dataclass(frozen=True)
class Speaker:
    """A causal language model with its tokenizer, found to be one by trying.

    Rows are padded on the right: there positions, whatever kind the model has, are the same with and without
    padding, and what stands in a row does not see its padding.

    Attributes:
        model: gives ``.logits`` (rows, tokens, vocabulary) for ``input_ids`` and ``attention_mask``.
        tokenizer: any of transformers.
        vocabulary: how many tokens it chooses from.
        stops: the tokens after which a text is over.
        longest: how many tokens the model can take, None if it does not say.
    """

    model: nn.Module
    tokenizer: Any
    vocabulary: int
    stops: tuple[int, ...]
    longest: int | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> Speaker:
        """Find out what is needed, with one small forward pass.

        Raises:
            EditError: there is no tokenizer, the model gives no logits for each token, or what it says of a
                token depends on later ones.
        """
        if not callable(tokenizer):
            raise EditError(
                f"a language slider needs the model's tokenizer, not {tokenizer!r}: give tokenizer=…"
            )
        settings = [getattr(model, name, None) for name in ("generation_config", "config")]
        ends: Any = [getattr(part, "eos_token_id", None) for part in (*settings, tokenizer)]
        ends = next((end for end in ends if end is not None), ())
        stops = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        config: Any = settings[1]
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        longest = getattr(config, "max_position_embeddings", None)
        longest = longest if isinstance(longest, int) and longest > 0 else None
        return cls(model, tokenizer, _vocabulary(model), stops, longest)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def tokens(self, text: str) -> list[int]:
        """A prompt's tokens, with those that the tokenizer puts first, without an end-of-text token behind.

        Raises:
            EditError: there are none, and no beginning-of-text token to stand for them.
        """
        found = list(self.tokenizer(text).input_ids)
        while len(found) > 1 and found[-1] in self.stops:
            found.pop()
        if not found:
            start = getattr(self.tokenizer, "bos_token_id", None)
            if start is None:
                raise EditError(
                    f"the prompt {text!r} has no tokens, and the tokenizer no beginning-of-text token: write "
                    "at least one word"
                )
            found = [start]
        return found

    def rows(self, texts: Sequence[str], *, room: int = 0) -> Rows:
        """Prompts as rows of tokens.

        Raises:
            EditError: a prompt with room for so many more tokens is longer than the model can take.
        """
        found = [self.tokens(text) for text in texts]
        longest = max(range(len(found)), key=lambda index: len(found[index]))
        length = len(found[longest])
        if self.longest is not None and length + room > self.longest:
            raise EditError(
                f"the prompt {texts[longest]!r} has {length} tokens; {room} more would be beyond the "
                f"{self.longest} that the model takes: shorten it, or lower trajectory_steps"
            )
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in found])
        lengths = torch.tensor([len(row) for row in found])
        return Rows(ids.to(self.device), lengths.to(self.device))

    def logits(self, rows: Rows, count: int) -> Float[Tensor, "rows count vocabulary"]:
        """What the model says of each row's last `count` tokens before it sees them; float32 or wider."""
        places = rows.lengths[:, None] - count + torch.arange(count, device=rows.ids.device)
        return self._before(rows, places)

    @torch.no_grad()
    def continued(self, prompts: Rows, count: int, generator: torch.Generator) -> Int[Tensor, "rows count"]:
        """Draw `count` tokens after each prompt from the model's own odds.

        Uniform numbers come from the CPU. What follows an end-of-text token is drawn as well: see `alive`.
        """
        drawn = prompts.ids.new_zeros(len(prompts.ids), 0)
        for _ in range(count):
            shown = prompts.followed(drawn)
            odds = self._before(shown, shown.lengths[:, None])[:, 0].softmax(-1).cumsum(-1)
            share = uniform(len(odds), generator)[:, None].to(odds)
            token = torch.searchsorted(odds, share * odds[:, -1:]).clamp_max(self.vocabulary - 1)
            drawn = torch.cat([drawn, token], 1)
        return drawn

    def alive(self, drawn: Int[Tensor, "rows count"]) -> Float[Tensor, "rows count"]:
        """1 for tokens up to the first end of the text, that one included; 0 behind it."""
        stops = torch.tensor(self.stops, dtype=drawn.dtype, device=drawn.device)
        ends = torch.isin(drawn, stops).long()
        return (ends.cumsum(-1) - ends == 0).float()

    def _before(
        self, rows: Rows, places: Int[Tensor, "rows count"]
    ) -> Float[Tensor, "rows count vocabulary"]:
        """Logits of the tokens at some places, read off one place earlier."""
        mask = (torch.arange(rows.ids.shape[1], device=rows.ids.device) < rows.lengths[:, None]).long()
        out = self.model(input_ids=rows.ids, attention_mask=mask, use_cache=False).logits
        found = out.gather(1, (places - 1)[:, :, None].expand(-1, -1, out.shape[-1]))
        return found.to(torch.promote_types(found.dtype, torch.float32))


@torch.no_grad()
def _vocabulary(model: nn.Module) -> int:
    """The width of the logits of a model that is shown to be causal: no token changes what is before it."""
    ids = torch.tensor([[0, 1], [0, 0]], device=next(model.parameters()).device)
    kind = type(model).__name__
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    except (AttributeError, TypeError, ValueError) as error:
        raise EditError(
            f"{kind} gives no logits for input_ids and attention_mask ({error}): a language slider needs a "
            "causal language model with its head"
        ) from error
    if found.ndim != 3 or found.shape[:2] != ids.shape:
        raise EditError(
            f"{kind} gives logits of shape {tuple(found.shape)} for 2 rows of 2 tokens: not one a token"
        )
    apart = (found[0, 0] - found[1, 0]).abs().max() / found[0, 0].abs().max().clamp_min(1e-30)
    if not float(apart) < max(1e-5, 2 * torch.finfo(found.dtype).eps):
        raise EditError(
            f"what {kind} says of a token depends on the tokens behind it, or is no number: a language "
            "slider needs a causal language model"
        )
    return found.shape[-1]
