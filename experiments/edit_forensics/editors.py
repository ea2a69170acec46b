"""Stand-ins for ROME, MEMIT and AlphaEdit, from the formulas of their papers; each gives the difference ΔW.

Keys k are what enters the last matrix of a block's MLP at the subject's last token; C = E[k kᵀ] over text. A
target is an offset of that matrix's output there, found by gradient descent as in ROME (Meng et al., 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.edit_forensics.requests import Prompts, Request, tokens_of
from geoedit.testbeds import World


@dataclass(frozen=True)
class Editing:
    """How the stand-ins edit.

    Attributes:
        condition: this share of the mean eigenvalue is added to C, which is singular in the almanac: half of
            its neurons are silent.
        layer: of ROME. layers: of MEMIT and AlphaEdit, from low to high; targets are found at the last.
        prefixes: texts put before the prompt, over which keys are averaged; one is empty.
        steps, rate: of the descent for a target. divergence: weight of the KL divergence of the essence
            prompt. decay: weight of the target's norm. clamp: the longest target, in norms of the
            stream behind the block.
        covariance_weight: MEMIT's λ, the weight of C.
        null_share: AlphaEdit's null space holds the eigenvectors of C whose eigenvalues together are at most
            this share of the trace.
        ridge: AlphaEdit's L2, in mean squared norms of a key.
    """

    condition: float = 0.01
    layer: int = 0
    layers: tuple[int, ...] = (0, 1)
    prefixes: tuple[str, ...] = ("", "people say that")
    steps: int = 20
    rate: float = 0.5
    divergence: float = 0.0625
    decay: float = 0.1
    clamp: float = 1.5
    covariance_weight: float = 100.0
    null_share: float = 0.05
    ridge: float = 0.03


class Editor:
    """A model that can be edited, with what an editor knows of it: its tokenizer and C of each layer."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, covariances: dict[int, Tensor], editing: Editing
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.tokenizer, self.editing = tokenizer, editing
        self.moments = covariances
        self.covariances = {
            layer: C
            + editing.condition * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
            for layer, C in covariances.items()
        }
        self.device = next(self.model.parameters()).device

    def name(self, layer: int) -> str:
        """The name of the last matrix of a block's MLP."""
        return last_of_mlp(self.model, layer)

    def owner(self, layer: int) -> nn.Module:
        """The module of that matrix."""
        return self.model.get_submodule(self.name(layer).removesuffix(".weight"))

    def prompts(self, requests: Sequence[Request], *, answers: bool = False) -> Prompts:
        """Each request behind each prefix, prefix by prefix."""
        parts = [
            (prefix, one.template, one.subject, one.object if answers else "")
            for prefix in self.editing.prefixes
            for one in requests
        ]
        return tokens_of(self.tokenizer, parts, self.device)

    def keys(self, requests: Sequence[Request], layer: int) -> Float[Tensor, "requests n"]:
        """The mean over the prefixes of the input of a layer's matrix at the subject's last token."""
        prompts = self.prompts(requests)
        with torch.no_grad(), captured(self.owner(layer)) as seen:
            self.model(input_ids=prompts.ids, attention_mask=prompts.mask)
        rows = torch.arange(len(prompts.ids), device=self.device)
        return seen[0][0][rows, prompts.subject].unflatten(0, (-1, len(requests))).mean(0)

    def targets(self, requests: Sequence[Request], layer: int) -> Float[Tensor, "requests d"]:
        """Offsets of the output at the subject's last token that make the model answer the object."""
        editing = self.editing
        asked = self.prompts(requests, answers=True)
        essence = tokens_of(
            self.tokenizer, [("", "{x} is", one.subject, "") for one in requests], self.device
        )
        owner = self.owner(layer)
        start = block_states(self, requests, layer)
        unit = start.norm(dim=-1, keepdim=True)
        offset = torch.zeros_like(start, requires_grad=True)
        usual = self._likely(essence).detach()
        optimizer = torch.optim.Adam([offset], lr=editing.rate)
        for _ in range(editing.steps):
            optimizer.zero_grad()
            repeated = offset.repeat(len(editing.prefixes), 1)
            with added(owner, asked.subject, repeated):
                logits = self.model(input_ids=asked.ids, attention_mask=asked.mask).logits
            told = nn.functional.cross_entropy(
                logits.flatten(0, 1), asked.labels.flatten(), reduction="none"
            ).view_as(asked.labels)
            loss = told.sum(1) / (asked.labels >= 0).sum(1)
            with added(owner, essence.subject, offset):
                drift = (usual.exp() * (usual - self._likely(essence))).sum()
            loss = loss.sum() / len(editing.prefixes) + editing.divergence * drift
            (loss + editing.decay * (offset / unit).square().sum()).backward()
            optimizer.step()
            with torch.no_grad():
                offset.mul_((editing.clamp * unit / offset.norm(dim=-1, keepdim=True)).clamp(max=1.0))
        return offset.detach()

    def _likely(self, prompts: Prompts) -> Tensor:
        logits = self.model(input_ids=prompts.ids, attention_mask=prompts.mask).logits
        rows = torch.arange(len(prompts.ids), device=self.device)
        return logits[rows, prompts.mask.sum(1) - 1].log_softmax(-1)

    def add(self, layer: int, change: Float[Tensor, "out n"]) -> None:
        """Add ΔW (out, in) to a layer's matrix."""
        owner = self.owner(layer)
        owner.weight.add_(change.mT if type(owner).__name__ == "Conv1D" else change)  # type: ignore[operator]


def rome(editor: Editor, requests: Sequence[Request]) -> None:
    """One edit after the other, each of rank one in one layer: W += (v − W k) (C⁻¹k)ᵀ / (kᵀC⁻¹k)."""
    layer = editor.editing.layer
    for request in requests:
        key = editor.keys([request], layer)[0]
        right = torch.linalg.solve(editor.covariances[layer], key)
        target = editor.targets([request], layer)[0]
        editor.add(layer, torch.outer(target, right) / (key @ right))


def memit(editor: Editor, requests: Sequence[Request], wanted: Tensor | None = None) -> None:
    """All edits at once over several layers: W += R Kᵀ (λ C + K Kᵀ)⁻¹, R the rest divided by layers left."""

    def right(layer: int, keys: Tensor) -> Tensor:
        weighed = editor.editing.covariance_weight * editor.covariances[layer]
        return torch.linalg.solve(weighed + keys.mT @ keys, keys.mT)

    _spread(editor, requests, wanted, right)


def alphaedit(editor: Editor, requests: Sequence[Request], wanted: Tensor | None = None) -> None:
    """As MEMIT, in the null space of C: W += R Kᵀ P (K Kᵀ P + L2)⁻¹ (Fang et al., 2024, one batch)."""

    def right(layer: int, keys: Tensor) -> Tensor:
        projector = null_space(editor.moments[layer], editor.editing.null_share)
        ridge = editor.editing.ridge * keys.square().sum(1).mean()
        eye = torch.eye(len(projector), dtype=keys.dtype, device=keys.device)
        return torch.linalg.solve(projector @ keys.mT @ keys + ridge * eye, projector @ keys.mT)

    _spread(editor, requests, wanted, right)


def null_space(covariance: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """The projector on the eigenvectors of C with the least eigenvalues, of this share of the trace."""
    values, vectors = torch.linalg.eigh(covariance.double())
    kept = vectors[:, values.clamp_min(0).cumsum(0) <= share * values.sum()]
    return (kept @ kept.mT).to(covariance.dtype)


def _spread(
    editor: Editor,
    requests: Sequence[Request],
    wanted: Tensor | None,
    right: Callable[[int, Tensor], Tensor],
) -> None:
    """Layer by layer, a part of what the last layer's output still lacks."""
    layers = editor.editing.layers
    wanted = editor.targets(requests, layers[-1]) if wanted is None else wanted
    before = block_states(editor, requests, layers[-1])
    for done, layer in enumerate(layers):
        lacking = before + wanted - block_states(editor, requests, layers[-1])
        keys = editor.keys(requests, layer)
        editor.add(layer, (right(layer, keys) @ lacking / (len(layers) - done)).mT)


def block_states(editor: Editor, requests: Sequence[Request], layer: int) -> Float[Tensor, "requests d"]:
    """The residual stream behind a block at the subject's last token, without a prefix."""
    parts = [("", one.template, one.subject, "") for one in requests]
    prompts = tokens_of(editor.tokenizer, parts, editor.device)
    with torch.no_grad():
        states = editor.model(
            input_ids=prompts.ids, attention_mask=prompts.mask, output_hidden_states=True
        ).hidden_states
    return states[layer + 1][torch.arange(len(requests), device=editor.device), prompts.subject]


METHODS: dict[str, Callable[[Editor, Sequence[Request]], None]] = {
    "ROME": rome,
    "MEMIT": memit,
    "AlphaEdit": alphaedit,
}


def covariances(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layers: Sequence[int], *, batch: int = 256
) -> dict[int, Float[Tensor, "n n"]]:
    """C = E[k kᵀ] of every layer over all tokens of the texts."""
    device = next(model.parameters()).device
    sums: dict[int, Tensor] = {}
    count = 0
    ordered = sorted(texts, key=lambda text: len(text.split()))
    for start in range(0, len(ordered), batch):
        parts = [("", "{x}", text, "") for text in ordered[start : start + batch]]
        prompts = tokens_of(tokenizer, parts, device)
        with torch.no_grad(), _all_captured(model, layers) as seen:
            model(input_ids=prompts.ids, attention_mask=prompts.mask)
        count += int(prompts.mask.sum())
        for layer in layers:
            keys = seen[layer][0][0][prompts.mask.bool()]
            sums[layer] = sums.get(layer, torch.zeros((), device=device)) + keys.mT @ keys
    return {layer: total / count for layer, total in sums.items()}


def texts_of(world: World, which: int, count: int) -> list[str]:
    """Sentences that the almanac was trained on; lists of different `which` (0, 1, …) share none."""
    told = [one for one in world.questions if one.split == "train"]
    generator = torch.Generator().manual_seed(17)
    order = torch.randperm(len(told), generator=generator).tolist()
    chosen = [told[index] for index in order[which * count : (which + 1) * count]]
    return [f"{one.text} {one.answer}" for one in chosen]


def last_of_mlp(model: nn.Module, layer: int) -> str:
    """The parameter name of the last matrix of a block's MLP in the almanac's models."""
    names = dict(model.named_parameters())
    for pattern in ("transformer.h.{}.mlp.c_proj.weight", "model.layers.{}.mlp.down_proj.weight"):
        if pattern.format(layer) in names:
            return pattern.format(layer)
    raise ValueError(f"{type(model).__name__} has no MLP of a GPT-2 or a Llama in block {layer}")


@contextmanager
def captured(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of a module, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _all_captured(
    model: nn.Module, layers: Sequence[int]
) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer].append((inputs[0], output))

    handles = []
    for layer in layers:
        owner = model.get_submodule(last_of_mlp(model, layer).removesuffix(".weight"))
        handles.append(owner.register_forward_hook(partial(note, layer)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def added(module: nn.Module, places: Tensor, offsets: Tensor) -> Iterator[None]:
    """Offsets (rows, d) added to a module's output, each at its own place of its row."""

    def change(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        where = nn.functional.one_hot(places, output.shape[1]).to(output.dtype)
        return output + where.unsqueeze(-1) * offsets.unsqueeze(1)

    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
