"""The metric that a language model pulls back from its next-token probabilities to a state inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.activations import collect
from geoedit.activations.inputs import Batch, Tensors, Texts, read_inputs
from geoedit.activations.reading import locate_all
from geoedit.anatomy import Location, anatomy
from geoedit.concept import Prompt
from geoedit.diagnosis.derivatives import answer_place, at_place, attach, derive, one_token, run
from geoedit.diagnosis.metric import categorical_factor, sampled_factor
from geoedit.diagnosis.prepare import check_answer_places, check_counts
from geoedit.diagnosis.readouts import Readouts
from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import Site
from manifolds.cloud.sampled_metric import SampledMetric
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


def sampled_metric(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Prompt],
    site: Site,
    *,
    values: Sequence[str] | None = None,
    output: str = "next token",
    samples: int = 16,
    temperature: float = 1.0,
    rank: int | None = None,
    damping: float | None = None,
    bandwidth: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> SampledMetric:
    r"""The pulled-back Fisher metric at the states of prompts, to be carried without the model.

    \(g(h) = \mathrm E_{y \sim p} \nabla \log p(y \mid h)\, \nabla \log p(y \mid h)^\top\) at the state \(h\)
    of every prompt, as a factor of a few rows, and the mean of the nearest ones between them. Give it to a
    manifold by `manifold.with_metric(...)`: its geodesics then avoid places where the model's answer changes
    fast. A model without logits has the metric of its last states instead, by random projections.

    Args:
        model: a language model, a masked one or an encoder; run in evaluation mode and left as it was.
        tokenizer: its tokenizer.
        prompts: texts, or the prompts of a concept.
        site: where, at one token of each prompt.
        values: what each text is about, for a site at the token "value".
        output: "next token", with labels drawn from the model's own distribution: unbiased, and blind where
            the model is sure, as Fisher's metric is; or "answers", exact, for the distribution over the first
            tokens of the prompts' answers and all else together.
        samples: labels (or projections) drawn at each prompt, the rows of a factor.
        temperature: of the distribution over "answers": a higher one keeps sight where the model is sure.
        rank: keep only that many largest directions of each factor; all if not given.
        damping: \(\varepsilon\) of \(\varepsilon I\), in squared units of output a unit of state; a hundredth
            of the mean eigenvalue of the metric if not given.
        bandwidth: see `manifolds.SampledMetric`.
        batch_size: prompts in one forward.
        seed: of the draws.

    Raises:
        EditError: the site is not there, or means several tokens; the prompts have no answers, or the model
            no logits for them; a number is out of range; the metric is zero everywhere.

    Source: Amari, Information geometry (2016), section 2.2; Arvanitidis et al. 2022, Pulling back information
    geometry.
    """
    check_counts(samples=samples, batch_size=batch_size, **({} if rank is None else {"rank": rank}))
    source = read_inputs(model, tokenizer, prompts, values)
    if not isinstance(source, Texts):
        raise EditError("a sampled metric is made from prompts and a tokenizer, not from ready tensors.")
    known = anatomy(model)
    source.check(model, (site,))
    readouts = _readouts(tokenizer, prompts, output, samples, seed, logits=known.unembedding is not None)
    if readouts.logits:
        check_answer_places(source, tokenizer, known)
    found = derive(
        model,
        source,
        range(len(source)),
        locate_all(model, [site]),
        readouts,
        mask_token=getattr(tokenizer, "mask_token_id", None),
        batch_size=batch_size,
    )
    gradients, count = found.gradients[site], len(readouts.answers) + 1  # the answers, and all else
    if readouts.answers:
        odds = found.outputs[:, :count].to(gradients)
        factors = categorical_factor(gradients[:, :count], odds, temperature)
    else:
        factors = sampled_factor(gradients)
    if rank is not None and rank < min(factors.shape[1:]):
        _, sizes, directions = torch.linalg.svd(factors, full_matrices=False)
        factors = sizes[:, :rank, None] * directions[:, :rank]
    states = collect(model, tokenizer, prompts, site, values=values, batch_size=batch_size)[site]
    mean = float(factors.double().square().sum((1, 2)).mean()) / factors.shape[2]
    if damping is None and not mean > 0:
        raise EditError(
            f"the output does not change with the state at the site {site}: the metric is zero at every "
            "prompt. Choose a site that the output depends on, another temperature, or give damping."
        )
    return SampledMetric(
        states.to(factors.dtype),
        factors.to(states.device),
        damping=mean / 100 if damping is None else damping,
        bandwidth=bandwidth,
    )


def _readouts(
    tokenizer: Any, prompts: Sequence[Any], output: str, samples: int, seed: int, *, logits: bool
) -> Readouts:
    """What to derive of the output at each prompt."""
    if output == "next token":
        return Readouts((), samples, seed, logits)
    if output != "answers":
        raise EditError(f"output is {output!r}; give 'next token' or 'answers'.")
    given = [prompt for prompt in prompts if getattr(prompt, "answer", None) is not None]
    ids = tuple(dict.fromkeys(prompt.answer_ids(tokenizer)[0] for prompt in given))
    if not logits or len(ids) < 2:
        raise EditError(
            f"output='answers': the model has {'' if logits else 'no '}logits and the prompts have {len(ids)}"
            " different answers; give prompts of a concept with two or more, to a model with logits, or use "
            "output='next token'."
        )
    return Readouts(ids, 1, seed, logits)


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
