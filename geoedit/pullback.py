"""The metric that a language model pulls back from its next-token probabilities to a state inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.activations.inputs import Batch, Tensors, Texts, read_inputs
from geoedit.activations.reading import locate_all
from geoedit.anatomy import Location
from geoedit.concept import Prompt
from geoedit.diagnosis.derivatives import answer_place, at_place, attach, one_token, run
from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import Site
from manifolds.pulled_back import OutputMetric, Pullback
from manifolds.pulled_back.output_metrics import OutputMetricLike


def from_site(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[str] | Sequence[Prompt] | Mapping[str, Tensor],
    site: Site,
    *,
    values: Sequence[str] | None = None,
    output_metric: OutputMetricLike | OutputMetric = "fisher",
    damping: float = 0.0,
    derivatives: Literal["forward", "reverse"] = "forward",
) -> Pullback:
    """The metric on states at a site: how far the next token's distribution moves when the state does.

    Its map takes states (items, width) to the logits (items, vocabulary) at the prompt's last token (at the
    mask token of a masked model), with the state at the site replaced and everything after it computed anew.
    The model is run in evaluation mode, with attention written out ("eager"), and left as it was after each
    call: its fused attention kernels have no forward-mode derivative and no second one. Models with another
    attention that lacks forward mode take derivatives="reverse".

    Args:
        model: a language model or a masked one.
        tokenizer: its tokenizer; None with ready inputs.
        prompts: one prompt, or several of which each item of a batch of states has one: a batch (…, prompts,
            width); or ready input tensors.
        site: where, at one token of each prompt.
        values: what each prompt is about, for a site at the token "value".
        output_metric: see `Pullback`; Fisher's metric of the next token if not given.
        damping: see `Pullback`. A state of more directions than the outputs see has a degenerate metric
            without it.
        derivatives: see `Pullback`.

    Raises:
        EditError: the site is not there, or means several tokens; prompts of several lengths.
    """
    source = read_inputs(model, tokenizer, [prompts] if isinstance(prompts, str) else prompts, values)
    places = locate_all(model, [site])
    source.check(model, (site,))
    if source.lengths is not None and len(set(source.lengths)) > 1:
        raise EditError(
            f"the prompts have {min(source.lengths)} to {max(source.lengths)} tokens; one metric takes "
            "prompts of one "
            "length, so that none is padded. Make one for each length."
        )
    mask_token = getattr(tokenizer, "mask_token_id", None)
    return Pullback(
        _Rest(model, source, site, places[site], mask_token),
        output_metric,
        damping=damping,
        derivatives=derivatives,
    )


class _Rest:
    """The model from a site on: states (items, width) to logits (items, vocabulary)."""

    def __init__(
        self,
        model: nn.Module,
        source: Texts | Tensors,
        site: Site,
        location: Location,
        mask_token: int | None,
    ) -> None:
        self.model, self.site, self.location, self.mask_token = model, site, location, mask_token
        self.source, self.count = source, len(source)

    def __call__(self, states: Float[Tensor, "items width"]) -> Float[Tensor, "items vocabulary"]:
        width = self.location.width
        if states.dim() != 2 or (width and states.shape[1] != width):
            raise EditError(
                f"states for the site {self.site} have shape {tuple(states.shape)}; they must be (…, "
                f"{width})."
            )
        if states.shape[0] % self.count:
            raise EditError(
                f"{states.shape[0]} states do not divide among {self.count} prompts; give (…, "
                f"{self.count}, width)."
            )
        times = states.shape[0] // self.count
        batch = self.source.batch([i for i in range(self.count) for _ in range(times)])
        handle_function = _Put(self.site, batch, states)
        with ExitStack() as stack:
            stack.enter_context(_as_written(self.model))
            handle = stack.enter_context(attach(self.model, self.site, self.location, handle_function))
            logits = run(self.model, batch)
            if handle.calls == 0:
                raise EditError(f"the module at the site {self.site} never ran, so no state was put there.")
        return at_place(logits, answer_place(batch, self.mask_token))


class _Put:
    """Puts states in place of the model's own at one token of each row."""

    def __init__(self, site: Site, batch: Batch, states: Tensor) -> None:
        self.site, self.batch, self.states = site, batch, states

    def __call__(self, whole: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        chosen = one_token(self.site, self.batch, selected).to(whole.device)[:, :, None]
        return torch.where(chosen, self.states.to(whole)[:, None, :], whole)


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and with attention written out; modes and configs are put back."""
    modes = [(module, module.training) for module in model.modules()]
    configs: dict[int, Any] = {
        id(module.config): module.config for module, _ in modes if hasattr(module, "config")
    }
    kernels = [
        (config, config._attn_implementation)
        for config in configs.values()
        if getattr(config, "_attn_implementation", None) is not None
    ]
    model.eval()
    for config, _ in kernels:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, kernel in kernels:
            config._attn_implementation = kernel
        for module, mode in modes:
            module.training = mode
