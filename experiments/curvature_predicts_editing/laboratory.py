"""One model with every prompt of the comparison: what it answers unedited, and its states at all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.curvature_predicts_editing.control import run_with_states, unedited
from geoedit.activations import collect
from geoedit.activations.inputs import Texts, read_inputs
from geoedit.anatomy import Location, anatomy
from geoedit.concept import Concept, Prompt
from geoedit.diagnosis.prepare import default_sites
from geoedit.errors import EditError
from geoedit.site import Site


@dataclass(frozen=True)
class Laboratory:
    """A model, its prompts, and what it does with them unedited.

    Attributes:
        name: of the model.
        model: left as it was by everything here.
        prompts: of all concepts, and of the controls.
        rows: for each concept the places of its prompts, in the order of `concept.prompts()`.
        source: the prompts as tokens.
        answers: the first token of each prompt's answer; -1 where it has none.
        before: log-probabilities of the next token, unedited.
        right: whether the likeliest next token is the answer.
        places: the sites. states: at each site, of every prompt.
        states: see `places`.
    """

    name: str
    model: nn.Module
    prompts: tuple[Prompt, ...]
    rows: Mapping[str, Int[np.ndarray, " own"]]
    source: Texts
    answers: Int[Tensor, " prompts"]
    before: Float[Tensor, "prompts vocabulary"]
    places: Mapping[Site, Location]
    states: Mapping[Site, Float[Tensor, "prompts width"]]

    @property
    def right(self) -> np.ndarray:
        """Which prompts are answered right, unedited."""
        return (self.before.argmax(1) == self.answers).numpy()

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        concepts: Sequence[Concept],
        others: Sequence[Concept],
        *,
        each: int,
        seed: int,
    ) -> Laboratory:
        """Run every prompt of the concepts, and some of each other concept, unedited.

        The embedding is left out of the sites: there a value leaves the same state in every sentence, so that
        nothing can be held out.

        Args:
            name: of the model.
            model: the model. tokenizer: its tokenizer.
            tokenizer: see `model`.
            concepts: whose prompts are all taken.
            others: of which some prompts are taken, as controls.
            each: how many prompts of each of the others.
            seed: of that draw.
        """
        generator = np.random.default_rng(seed)
        prompts: list[Prompt] = []
        rows: dict[str, np.ndarray] = {}
        named = {concept.name: concept.prompts() for concept in concepts}
        for concept in others:
            every = [prompt for prompt in concept.prompts() if prompt.answer is not None]
            if concept.name not in named and every:
                drawn = generator.choice(len(every), min(each, len(every)), replace=False)
                named[concept.name] = [every[place] for place in np.sort(drawn)]
        for own, found in named.items():
            rows[own] = np.arange(len(prompts), len(prompts) + len(found))
            prompts += found
        source = read_inputs(model, tokenizer, prompts)
        if not isinstance(source, Texts):
            raise EditError("a comparison reads prompts as text.")
        known = anatomy(model)
        places = {
            site: known.locate(site) for site in default_sites(known, True) if site.stream != "embedding"
        }
        states = collect(model, tokenizer, prompts, places, batch_size=128, progress=False)
        answers = [-1 if p.answer is None else p.answer_ids(tokenizer)[0] for p in prompts]
        return cls(
            name=name,
            model=model,
            prompts=tuple(prompts),
            rows=rows,
            source=source,
            answers=torch.tensor(answers),
            before=unedited(model, source).cpu(),
            places=places,
            states={site: states[site].float().cpu() for site in places},
        )

    def run(self, site: Site, rows: Sequence[int], states: Float[Tensor, "runs width"], use: Any) -> None:
        """Run prompts with given states; see `run_with_states`."""
        run_with_states(self.model, self.source, site, self.places[site], rows, states, use)

    def carried(
        self, site: Site, source: Int[np.ndarray, " pairs"], target: Int[np.ndarray, " pairs"]
    ) -> float:
        """The share of pairs whose answer becomes the target's when the target's own state is put in.

        This is the best that any edit at the site could do, and uses none of the edits that are compared.
        """
        wanted = self.answers[torch.tensor(target)]
        hit = torch.zeros(len(wanted), dtype=torch.bool)

        def use(chosen: list[int], after: Tensor) -> None:
            hit[torch.tensor(chosen)] = after.argmax(1).cpu() == wanted[torch.tensor(chosen)]

        self.run(site, source.tolist(), self.states[site][torch.tensor(target)], use)
        return float(hit.float().mean())
