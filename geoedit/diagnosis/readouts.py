"""What is read off a model's output to be derived: log-probabilities of answers, of drawn labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.diagnosis.observe import log_odds
from geoedit.diagnosis.predict import Edits, Gradients, Rows


@dataclass
class Readouts:
    """The numbers to derive at each prompt, and what was seen of the unedited model on the way.

    Attributes:
        answers: token ids of the concept's answers; empty where there are none.
        samples: how many labels (with logits) or projections (without) to draw at each prompt.
        seed: of the draws; each prompt has its own, whatever the batches.
        logits: whether the output is logits.
        best: most likely token of each prompt. odds: log-odds of every answer at each prompt.
    """

    answers: Sequence[int]
    samples: int
    seed: int
    logits: bool
    best: dict[int, int] = field(default_factory=dict)
    odds: dict[int, Float[Tensor, " answers"]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers are derived at each prompt."""
        return self.samples + (len(self.answers) + 1 if self.answers else 0)

    def __call__(self, output: Float[Tensor, "batch size"], rows: Sequence[int]) -> Float[Tensor, "batch k"]:
        """Log-probabilities of each answer, all else together, and drawn labels; or random projections."""
        output = output if output.dtype == torch.float64 else output.float()
        if not self.logits:
            signs = torch.stack([self._signs(row, output.shape[1]) for row in rows]).to(output)
            return torch.einsum("bsw,bw->bs", signs, output)
        log_probabilities = output.log_softmax(-1)
        labels = torch.stack([self._labels(row, log_probabilities[i]) for i, row in enumerate(rows)])
        drawn = log_probabilities.gather(1, labels.to(output.device))
        if not self.answers:
            return drawn
        ids = torch.tensor(self.answers, device=output.device)
        rest = log_probabilities.index_fill(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        for place, row in enumerate(rows):
            self.best[row] = int(output[place].argmax())
            every = output[place].detach().expand(len(ids), -1)
            self.odds[row] = log_odds(every, ids).cpu()
        return torch.cat([log_probabilities[:, ids], rest, drawn], 1)

    def split(
        self,
        outputs: Float[Tensor, "rows k"],
        gradients: Float[Tensor, "rows k width"],
        rows: Rows,
    ) -> tuple[Gradients, Rows]:
        """Tell the gradients at one site apart, and put the answers' outputs beside the rows."""
        count = len(self.answers) + 1 if self.answers else 0
        if not self.logits:
            return Gradients(output=gradients), rows
        if not count:
            return Gradients(sampled=gradients), rows
        return (
            Gradients(answers=gradients[:, :count], sampled=gradients[:, count:]),
            replace(rows, answers=outputs[:, :count].to(gradients)),
        )

    def accuracy(self, groups: Sequence[int]) -> float:
        """The share of the prompts with an answer that the unedited model answers right."""
        asked = [row for row, group in enumerate(groups) if group >= 0]
        return sum(self.best[row] == self.answers[groups[row]] for row in asked) / len(asked)

    def wanted_odds(self, edits: Edits) -> Float[Tensor, " edits"]:
        """Log-odds of the wanted answer at the source prompt, unedited."""
        if edits.answer is None:
            return torch.full((len(edits.source),), torch.nan)
        every = torch.stack([self.odds[row] for row in edits.source.tolist()])
        return every.gather(1, edits.answer[:, None])[:, 0]

    def _labels(self, row: int, log_probabilities: Float[Tensor, " vocabulary"]) -> Int[Tensor, " samples"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return torch.multinomial(
            log_probabilities.detach().exp().cpu(), self.samples, replacement=True, generator=generator
        )

    def _signs(self, row: int, width: int) -> Float[Tensor, "samples width"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return torch.randint(0, 2, (self.samples, width), generator=generator).float() * 2 - 1
