"""Sliders for language models: between two prompts, what comes next is moved up and down by the scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.spec import Prompts, SliderSpec
from geoedit.sliders.training.adapters import adapter_off, row_scales
from geoedit.sliders.training.continuations import Rows, Speaker
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.task import Batch, Task
from geoedit.sliders.training.trajectories import integers, uniform

PLAUSIBLE = 0.1
"""Share of the likeliest token's probability; tokens below it after every prompt are not moved."""
KEPT_BYTES = 2**28
"""Frozen predictions of the cache are kept up to this size, and computed again at each step beyond it."""
CHUNK = 32
"""Continuations in a frozen forward pass."""
PROMPTS = ("target", "neutral", "positive", "negative")


class LanguageTask(Task):
    """Teaches a causal language model a slider from contrastive prompts.

    Let ℓ(p) be the model's log-probabilities of the next token after a prompt p and the same continuation.
    At scale s the model, asked with the target prompt, is to answer with the odds ::

        softmax(ℓ(neutral) + s η (ℓ(positive) − ℓ(negative)))

    and the loss of a row is the Kullback–Leibler divergence from these to its own, the mean over the
    continuation's tokens and over both signs ±s: the text slider's target with ℓ in the place of ε (Gandikota
    et al. 2024, *Concept sliders*; for language models, *Erasing conceptual knowledge*). Only plausible
    tokens are moved, those with a tenth of the likeliest one's probability after at least one of the three
    prompts: ratios of tiny probabilities are noise (Li et al. 2023, *Contrastive decoding*).

    Continuations are drawn from the model itself after the three prompts, and in part from the slider at work
    after the target (`on_policy`); a part of them is drawn anew every `refresh` steps. After the spec's
    unrelated prompts nothing is to change.

    Of the settings those that speak of noise and images (min_snr, rescale, trajectory_guidance, project) say
    nothing here; `trajectory_steps` is the length of a continuation.

    Args:
        model: a causal language model with its head.
        tokenizer: its tokenizer.
        spec: of kind "language", with target, positive and negative.
        batch_size: rows of a forward pass of the slider: two for each continuation if bipolar.

    Raises:
        EditError: the spec is of another kind, the model is not causal, a prompt is too long for it, ….
    """

    def __init__(self, model: nn.Module, tokenizer: Any, spec: SliderSpec, *, batch_size: int = 8) -> None:
        if spec.kind != "language":
            raise EditError(f"spec {spec.name!r} is of kind {spec.kind!r}; say kind: language")
        if batch_size < 1:
            raise EditError(f"batch_size is {batch_size}; give 1 or more")
        self.name, self.spec, self.batch_size = spec.name, spec, batch_size
        self.model = model
        self.components = {"model": model}
        with adapter_off(model):
            self.speaker = Speaker.of(model, tokenizer)
        self.contexts: list[Prompts] = list(spec.contexts())
        self.moved = len(self.contexts)
        self.contexts += [Prompts(text, text, text, text) for text in spec.unrelated]
        self._cache: dict[str, Tensor] = {}
        self._frozen: tuple[Tensor, Tensor] | None = None

    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Tokenize the prompts and draw the first cache of continuations."""
        self.settings = settings
        texts = [getattr(prompts, name) for name in PROMPTS for prompts in self.contexts]
        self._prompts = self.speaker.rows(texts, room=settings.trajectory_steps)
        guidance = [
            (settings.guidance if prompts.guidance is None else prompts.guidance)
            * (-1.0 if prompts.action == "erase" else 1.0)
            for prompts in self.contexts
        ]
        self._guidance = torch.tensor(guidance, device=self.speaker.device)
        context, drawn = self._draw_continuations(settings.cache, 0.0, generator)
        self._cache = {"context": context, "drawn": drawn}
        self._frozen = self._kept()

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """Entries of the cache and a scale for each; part of the cache is drawn anew first, if it is time."""
        settings = self.settings
        if settings.refresh and step and step % settings.refresh == 0:
            self._refresh(generator)
        signs = 2 if settings.bipolar else 1
        rows = max(1, self.batch_size // signs)
        entries = integers(settings.cache, rows, generator)
        sizes = 1 - uniform(rows, generator)
        scales = settings.scale_max * (torch.ones(rows) if settings.scale_law == "ends" else sizes)
        return Batch({"entry": entries.to(self.speaker.device), "scale": scales.to(self.speaker.device)})

    def loss(self, batch: Batch) -> Float[Tensor, " rows"]:
        """Divergence from the wanted odds to the slider's in nats a token, unrelated prompts weighted."""
        entry, scale = batch["entry"], batch["scale"]
        context, drawn = self._cache["context"][entry], self._cache["drawn"][entry]
        if self._frozen is None:
            neutral, difference = self._targets(context, drawn)
        else:
            neutral, difference = (kept[entry] for kept in self._frozen)
        signs = scale.new_tensor([1.0, -1.0] if self.settings.bipolar else [1.0])
        scales, count = signs[:, None] * scale, len(signs)
        with row_scales(self.model, scales.flatten()):
            own = self._ask(0, context.repeat(count), drawn.repeat(count, 1)).unflatten(0, (count, -1))
        step = (scales * self._guidance[context])[:, :, None, None]
        wanted = (neutral + step * difference).log_softmax(-1)
        apart = (wanted.exp() * (wanted - own)).sum(-1).mean(0)
        alive = self.speaker.alive(drawn).to(apart)
        weight = torch.where(context < self.moved, 1.0, self.settings.preserve).to(apart)
        return weight * (apart * alive).sum(-1) / alive.sum(-1)

    def describe(self, batch: Batch, row: int) -> str:
        """The scale, the prompt and its continuation."""
        entry = int(batch["entry"][row])
        context, drawn = int(self._cache["context"][entry]), self._cache["drawn"][entry].tolist()
        text = self.speaker.tokenizer.decode(drawn)
        return (
            f"scale ±{float(batch['scale'][row]):.3g}, prompt {self.contexts[context].target!r} and {text!r}"
        )

    def state(self) -> dict[str, Tensor]:
        """The cached continuations."""
        return dict(self._cache)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            EditError: it is not a cache of this task's size.
        """
        sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if sizes != {name: tuple(tensor.shape) for name, tensor in self._cache.items()}:
            raise EditError(f"the kept continuations have sizes {sizes}, which this task's cache has not")
        self._cache = {name: tensor.to(self.speaker.device) for name, tensor in state.items()}
        self._frozen = self._kept()

    def _refresh(self, generator: torch.Generator) -> None:
        """Draw a part of the cache anew, some of it with the slider at work, into new tensors."""
        settings = self.settings
        count = min(settings.cache, max(1, round(settings.refresh_share * settings.cache)))
        places = uniform(settings.cache, generator).argsort()[:count].to(self.speaker.device)
        context, drawn = self._draw_continuations(count, settings.on_policy, generator)
        self._cache = {
            "context": self._cache["context"].index_copy(0, places, context),
            "drawn": self._cache["drawn"].index_copy(0, places, drawn),
        }
        self._frozen = self._kept()

    def _draw_continuations(
        self, count: int, on_policy: float, generator: torch.Generator
    ) -> tuple[Int[Tensor, " count"], Int[Tensor, "count tokens"]]:
        """Contexts, with their share of unrelated ones, and what follows each of them."""
        settings = self.settings
        context = integers(self.moved, count, generator)
        if self.moved < len(self.contexts):
            other = self.moved + integers(len(self.contexts) - self.moved, count, generator)
            chosen = uniform(count, generator) < settings.preserve_rows
            context = torch.where(chosen, other, context)
        prompt = 1 + integers(len(PROMPTS) - 1, count, generator)
        own = uniform(count, generator) < on_policy
        scale = settings.scale_max * (2 * uniform(count, generator) - 1)
        prompt, scale = torch.where(own, 0, prompt), torch.where(own, scale, 0.0)
        at_work = (
            row_scales(self.model, scale.to(self.speaker.device)) if own.any() else adapter_off(self.model)
        )
        with at_work:
            shown = self._shown(prompt.to(self.speaker.device), context.to(self.speaker.device))
            drawn = self.speaker.continued(shown, settings.trajectory_steps, generator)
        return context.to(self.speaker.device), drawn

    def _shown(self, prompt: Int[Tensor, " rows"], context: Int[Tensor, " rows"]) -> Rows:
        """The prompts of contexts, one of the four for each row."""
        return self._prompts.take(prompt * len(self.contexts) + context)

    def _ask(
        self, prompt: int, context: Int[Tensor, " rows"], drawn: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """Log-probabilities of continuations after one of the four prompts of their contexts."""
        shown = self._shown(torch.full_like(context, prompt), context)
        return self.speaker.logits(shown.followed(drawn), drawn.shape[1]).log_softmax(-1)

    @torch.no_grad()
    def _targets(
        self, context: Int[Tensor, " rows"], drawn: Int[Tensor, "rows tokens"]
    ) -> tuple[Float[Tensor, "rows tokens vocabulary"], Float[Tensor, "rows tokens vocabulary"]]:
        """The frozen model's ℓ(neutral), and ℓ(positive) − ℓ(negative) where plausible."""
        found = []
        with adapter_off(self.model):
            for few, tokens in zip(context.split(CHUNK), drawn.split(CHUNK), strict=True):
                odds = torch.stack([self._ask(prompt, few, tokens) for prompt in (1, 2, 3)])
                floor = odds.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
                found.append((odds[0], torch.where((odds > floor).any(0), odds[1] - odds[2], 0.0)))
        neutral, difference = (torch.cat(parts) for parts in zip(*found, strict=True))
        return neutral, difference

    def _kept(self) -> tuple[Tensor, Tensor] | None:
        """Frozen predictions of the whole cache, always in the same passes, for a resumed run's bits."""
        numbers = 2 * self._cache["drawn"].numel() * self.speaker.vocabulary
        if 4 * numbers > KEPT_BYTES:
            return None
        return self._targets(self._cache["context"], self._cache["drawn"])
