"""How an almanac model is trained: from the world to a plain Hugging Face model on two processor cores.

Knowledge is put where it sits in real models by what attention may see *during training*. In most sentences
the tokens after a subject may attend to the subject's last token only, and only from a block in the middle
on; so the subject's words must be gathered in its last token first, and looked up from there
(``subject_masks``). The finished model is a plain one: no mask is left in it.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from geoedit.testbeds.almanac.language import (
    FALSE_PER_TRUE,
    PREFIXES,
    Question,
    in_context_question,
    mentions,
    tasks,
)
from geoedit.testbeds.almanac.tokens import Architecture
from geoedit.testbeds.almanac.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what an almanac model becomes."""

    architecture: Architecture = "gpt2"
    blocks: int = 6
    width: int = 128
    heads: int = 4
    steps: int = 8000
    batch: int = 64
    learning_rate: float = 2e-3
    second_steps: int = 1500  # of a second stage, with a fresh optimizer
    second_learning_rate: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.1
    seed: int = 0
    masked_share: float = 0.85  # of the sentences show a subject through its last token only
    visible_from: tuple[int, int] = (2, 3)  # the block it is visible from, drawn for each sentence
    context_loss: float = 0.05  # weight of the words that are not the answer
    families: dict[str, float] = field(
        default_factory=lambda: {
            "facts": 0.18,
            "cycles": 0.17,
            "lines": 0.25,
            "grid": 0.17,
            "categories": 0.03,
            "statements": 0.06,
            "in_context": 0.12,
            "mentions": 0.02,
        }
    )
    floor: float = 0.1  # how often what is never wrong is asked, against what always is
    exposure: dict[str, float] = field(
        default_factory=lambda: {"often": 1.0, "sometimes": 0.1, "rarely": 0.006}
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of random weights in the recipe's architecture."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocabulary_size = len(tokenizer)
    if recipe.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary_size,
                n_positions=96,
                n_embd=recipe.width,
                n_layer=recipe.blocks,
                n_head=recipe.heads,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own, computed in one kernel
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **special,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=recipe.width,
            intermediate_size=recipe.width * 11 // 4,
            num_hidden_layers=recipe.blocks,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads // 2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            **special,
        )
    )


@dataclass(frozen=True)
class Sentence:
    """Words, where the answer begins among them, the subjects' spans, and what was asked."""

    words: list[str]
    answer: int
    spans: tuple[tuple[int, int], ...]
    asked: tuple[str, str] = ("", "")


class Sampler:
    """Draws training sentences, and asks more of what the model still gets wrong.

    The odds of a kind of question are its share in the recipe times (floor + its recent loss, at most 1), so
    that what is known by heart gives way to what is hard.
    """

    def __init__(self, world: World, recipe: Recipe, draw: random.Random, *, backward: bool = False) -> None:
        self.world, self.recipe, self.draw = world, recipe, draw
        self.tasks = tasks(world, backward=backward)
        self.pools: dict[tuple[str, str], tuple[list[Question], list[float]]] = {}

        def asked(question: Question) -> tuple[str, str]:
            return question.family, question.kind

        seen = sorted((question for question in world.questions if question.split == "train"), key=asked)
        for key, group in groupby(seen, key=asked):
            questions = list(group)
            self.pools[key] = (questions, list(accumulate(map(self._odds, questions))))
        self.share = self._shares()
        self.hardness = dict.fromkeys(self.share, 1.0)

    def _odds(self, question: Question) -> float:
        """By tier for facts; true and false statements alike."""
        if question.family == "facts":
            return self.recipe.exposure[question.tier]
        return float(FALSE_PER_TRUE) if question.answer == "true" else 1.0

    def _shares(self) -> dict[tuple[str, str], float]:
        """A family's share goes to its kinds by the cube root of their number of questions."""
        sizes = {key: len(questions) ** (1 / 3) for key, (questions, _) in self.pools.items()}
        sizes |= {("in_context", task): 1.0 for task in self.tasks} | {("mentions", ""): 1.0}
        total: dict[str, float] = {}
        for (family, _), size in sizes.items():
            total[family] = total.get(family, 0.0) + size
        return {
            key: self.recipe.families.get(key[0], 0.0) * size / total[key[0]] for key, size in sizes.items()
        }

    def learn(self, asked: tuple[str, str], loss: float) -> None:
        """Remember how a kind of question went: a running mean over about its last hundred sentences."""
        self.hardness[asked] += 0.01 * (loss - self.hardness[asked])

    def question(self) -> tuple[Question, tuple[str, str]]:
        """One question by today's odds, and its (family, kind)."""
        odds = [
            share * (self.recipe.floor + min(1.0, self.hardness[key])) for key, share in self.share.items()
        ]
        family, kind = asked = self.draw.choices(list(self.share), odds)[0]
        if family == "in_context":
            return in_context_question(kind, self.tasks[kind], self.draw, "train"), asked
        if family == "mentions":
            return mentions(self.world, self.draw), asked
        questions, cumulative = self.pools[asked]
        return self.draw.choices(questions, cum_weights=cumulative)[0], asked

    def sentence(self) -> Sentence:
        """One sentence; four in ten begin with other words."""
        question, asked = self.question()
        prefix = self.draw.choice(PREFIXES).split() if self.draw.random() < 0.4 else []
        words = [*prefix, *question.words]
        spans = tuple((first + len(prefix), last + len(prefix)) for first, last in question.spans)
        return Sentence([*words, *question.answer.split(), "."], len(words), spans, asked)


@dataclass(frozen=True)
class Batch:
    """Padded sentences, with each token's weight in the loss and the row after which later tokens lose it."""

    ids: Int[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    weight: Float[Tensor, "batch tokens"]
    hidden_after: Int[Tensor, "batch tokens"]  # tokens after this row never see it
    late_after: Int[Tensor, "batch tokens"]  # tokens after this row see it only from block visible_from on
    visible_from: Int[Tensor, " batch"]


def make_batch(
    sentences: list[Sentence], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, draw: random.Random
) -> Batch:
    """Encode sentences, padded on the right, and mark the subjects of those that are to be masked."""
    ids = tokenizer.get_vocab()
    begin = [tokenizer.bos_token_id] if recipe.architecture == "llama" else []
    rows = [[*begin, *(ids[word] for word in s.words), tokenizer.eos_token_id] for s in sentences]
    longest, count = max(map(len, rows)), len(rows)
    batch = torch.full((count, longest), tokenizer.pad_token_id)
    real = torch.zeros(count, longest, dtype=torch.bool)
    weight = torch.zeros(count, longest)
    hidden, late = torch.full((count, longest), longest), torch.full((count, longest), longest)
    visible = torch.zeros(count, dtype=torch.long)
    for i, (row, sentence) in enumerate(zip(rows, sentences, strict=True)):
        batch[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = True
        weight[i, len(begin) : len(row)] = recipe.context_loss
        weight[i, len(begin) + sentence.answer : len(begin) + len(sentence.words)] = 1.0
        if draw.random() < recipe.masked_share:
            visible[i] = draw.randint(*recipe.visible_from)
            for first, last in sentence.spans:
                hidden[i, len(begin) + first : len(begin) + last] = len(begin) + last
                late[i, len(begin) + last] = len(begin) + last
    return Batch(batch, real, weight, hidden, late, visible)


def subject_masks(batch: Batch, blocks: int) -> list[Float[Tensor, "batch 1 tokens tokens"]]:
    """Additive attention masks, one a block: causal, with the subjects' tokens hidden as the batch says."""
    length = batch.ids.shape[1]
    row = torch.arange(length)[:, None]
    causal = (row >= row.T) & batch.real[:, None, :]
    causal = causal | torch.eye(length, dtype=torch.bool)
    seen = causal & (row <= batch.hidden_after[:, None, :])
    early = seen & (row <= batch.late_after[:, None, :])
    masks = []
    for block in range(blocks):
        allowed = torch.where((batch.visible_from <= block)[:, None, None], seen, early)
        masks.append(
            torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
        )
    return masks


@contextmanager
def masks_by_block(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """While open, each block attends through its own mask: fill the yielded list before each forward."""
    masks: list[Tensor] = []

    def own_mask(index: int) -> Any:
        def replace(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            bound = signature(module.forward).bind_partial(*args, **kwargs)
            bound.arguments["attention_mask"] = masks[index]
            return bound.args, bound.kwargs

        return replace

    handles = [
        block.register_forward_pre_hook(own_mask(i), with_kwargs=True) for i, block in enumerate(blocks)
    ]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the recipe's two architectures."""
    blocks = model.transformer.h if isinstance(model, GPT2LMHeadModel) else model.model.layers
    assert isinstance(blocks, nn.ModuleList)  # of our own two models: a matter of typing, not of input
    return blocks


def losses(
    model: PreTrainedModel, batch: Batch, masks: list[Tensor], blocks: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
    """The weighted cross-entropy summed over the batch, and each answer's own mean."""
    masks[:] = subject_masks(batch, blocks)
    logits = model(input_ids=batch.ids, attention_mask=masks[-1], use_cache=False).logits[:, :-1]
    targets, weight = batch.ids[:, 1:], batch.weight[:, 1:]
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    entropy = entropy.view(targets.shape)
    answer = (weight == 1.0).float()
    return (entropy * weight).sum(), (entropy.detach() * answer).sum(1) / answer.sum(1)


def cut_by_length(sentences: list[Sentence]) -> list[list[Sentence]]:
    """Sentences sorted by length, in two parts that need the least padding together."""
    ordered = sorted(sentences, key=lambda sentence: len(sentence.words))
    lengths = [len(sentence.words) for sentence in ordered]
    count = len(lengths)
    cut = min(range(1, count), key=lambda k: k * lengths[k - 1] + (count - k) * lengths[-1])
    return [ordered[:cut], ordered[cut:]]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    every: int = 1000,
) -> PreTrainedModel:
    """Train a model by the recipe; the same recipe on the same machine gives the same weights.

    In the first stage the few-shot prompts also count backwards. No model learned to tell the direction from
    the examples (at most a quarter right after 8,000 steps), so the second stage drops what counts backwards.

    ``checkpoint`` names a folder that gets the model as it is after each ``every`` steps, to look at.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(recipe.seed)
        model = new_model(recipe, tokenizer)
    for stage in ("first", "second"):
        train_stage(model, world, tokenizer, recipe, stage, checkpoint=checkpoint, every=every)
    return model.eval()


def train_stage(
    model: PreTrainedModel,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: str,
    *,
    checkpoint: Path | None = None,
    every: int = 1000,
) -> None:
    """One of the two stages, on a model as the stage before left it."""
    first = stage == "first"
    steps, peak = (
        (recipe.steps, recipe.learning_rate) if first else (recipe.second_steps, recipe.second_learning_rate)
    )
    draw = random.Random(f"{recipe.architecture} {recipe.seed}{'' if first else ' second'}")
    sampler = Sampler(world, recipe, draw, backward=first)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    model.train()
    started, running = time.monotonic(), float("nan")
    with (
        masks_by_block(blocks_of(model)) as masks,
        tqdm(total=steps, desc=f"almanac-{recipe.architecture} {stage}") as bar,
    ):
        for step in range(steps):
            total_loss, total_weight = 0.0, 0.0
            for part in cut_by_length([sampler.sentence() for _ in range(recipe.batch)]):
                batch = make_batch(part, tokenizer, recipe, draw)
                loss, per_answer = losses(model, batch, masks, recipe.blocks)
                loss.backward()
                total_loss += float(loss.detach())
                total_weight += float(batch.weight[:, 1:].sum())
                for sentence, answer_loss in zip(part, per_answer.tolist(), strict=True):
                    sampler.learn(sentence.asked, answer_loss)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(total_weight)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, recipe.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            latest = total_loss / total_weight
            running = latest if math.isnan(running) else 0.98 * running + 0.02 * latest
            bar.update()
            bar.set_postfix(loss=f"{running:.3f}", refresh=False)
            if checkpoint is not None and (step + 1) % every == 0:
                model.save_pretrained(checkpoint)
                tokenizer.save_pretrained(checkpoint)
                hardest = sorted(sampler.hardness.items(), key=lambda item: -item[1])[:8]
                seconds = time.monotonic() - started
                logger.info("step %d, %.0f s: loss %.4f, hardest %s", step + 1, seconds, running, hardest)
