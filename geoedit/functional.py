"""How straight the rest of a network is along a direction at a site: exact derivatives, site to output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.activations import collect
from geoedit.activations.inputs import Texts, read_inputs
from geoedit.anatomy import anatomy
from geoedit.concept import Prompt
from geoedit.diagnosis.prepare import check_answer_places
from geoedit.errors import EditError
from geoedit.pullback import from_site
from geoedit.site import Site
from manifolds.curvature import FunctionalCurvature, functional


def functional_curvature(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[str] | Sequence[Prompt],
    site: Site,
    direction: Float[Tensor, "*prompts width"],
    *,
    values: Sequence[str] | None = None,
    states: Float[Tensor, "prompts width"] | None = None,
    norm: Literal["fisher", "euclidean"] = "fisher",
    batch_size: int = 16,
) -> FunctionalCurvature:
    r"""The path of the output under a straight edit to second order: \(f(h + tv) = f + t f' + ½ t² f'' + …\).

    \(f\) takes the state \(h\) at the site to the logits at the prompt's last token (at the mask token of a
    masked model; in a model without logits to its last state there), with everything after the site computed
    anew. \(f'\) and \(f''\) are exact, by two nested forward derivatives of the network; no Hessian is
    formed. `ratio` is \(|f''|/|f'|\), in units of 1/scale of the edit; `radius(eps)` is the scale up to which
    the second-order term stays under `eps` of the first.

    Every field of the result has a row for each prompt, in their order. The model is run in evaluation mode,
    in float32 at least, and left as it was.

    Args:
        model: a language model, a masked one or an encoder.
        tokenizer: its tokenizer.
        prompts: one text, several, or the prompts of a concept; of any lengths.
        site: where, at one token of each prompt.
        direction: the edit's vector at scale 1: one for all prompts, or one for each.
        values: what each text is about, for a site at the token "value".
        states: from which states the path starts; each prompt's own if not given.
        norm: how the output is measured: "fisher", in which what adds the same to all logits has no length
            and neither has what the model is sure not to say; or "euclidean".
        batch_size: prompts in one pass.

    Raises:
        EditError: the site is not there, means several tokens, or does not reach the output; a shape does not
            fit; the Fisher norm is asked of a model without logits.

    Source: the nested form is the directional case of Betancourt, "A geometric theory of higher-order
    automatic differentiation" (2018).
    """
    texts: Sequence[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    source = cast(Texts, read_inputs(model, tokenizer, texts, values))
    count, known = len(source), anatomy(model)
    if norm not in ("fisher", "euclidean"):
        raise EditError(f"norm is {norm!r}; give 'fisher' or 'euclidean'.")
    if known.unembedding is not None:
        check_answer_places(source, tokenizer, known)
    elif norm == "fisher":
        raise EditError(
            f"{type(model).__name__} has no logits, so its output has no Fisher norm; give norm='euclidean'."
        )
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}; give 1 or more.")
    own = collect(model, tokenizer, texts, site, values=values, batch_size=batch_size)[site]
    if own.shape[0] != count:
        raise EditError(
            f"the site {site} means {own.shape[0]} states of {count} prompts; a path starts from one state a "
            "prompt: use 'last', 'value' or an integer."
        )
    own = _checked("states", own if states is None else states, own)
    vectors = _checked("direction", direction, own)
    parts: dict[str, dict[int, Tensor]] = {field.name: {} for field in fields(FunctionalCurvature)}
    for chosen in _batches(source.lengths, batch_size):
        rest = from_site(
            model,
            tokenizer,
            [texts[row] for row in chosen],
            site,
            values=None if values is None else [values[row] for row in chosen],
        )

        def read(given: Tensor, rest: Any = rest) -> Tensor:
            output = rest.f(given)
            return output if output.dtype == torch.float64 else output.float()

        found = functional(read, own[chosen], vectors[chosen], norm=norm)
        for name, rows in parts.items():
            rows.update(zip(chosen, getattr(found, name), strict=True))
    whole = {name: torch.stack([rows[row] for row in range(count)]) for name, rows in parts.items()}
    if not bool((whole["first"] != 0).any() or (whole["second"] != 0).any()):
        raise EditError(
            f"the direction changes nothing of the output at the site {site}: the site does not reach it, a "
            "norm layer takes the direction out, or the vector is zero. Choose another site or direction."
        )
    return FunctionalCurvature(**whole)


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of one length together, so that none is padded."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return [
        rows[start : start + batch_size]
        for rows in groups.values()
        for start in range(0, len(rows), batch_size)
    ]


def _checked(name: str, given: Tensor, own: Tensor) -> Tensor:
    """One vector for each prompt, in float32 at least, where the states are."""
    if given.shape[-1:] != own.shape[-1:] or given.shape not in (own.shape, own.shape[-1:]):
        raise EditError(
            f"{name} has shape {tuple(given.shape)}; give ({own.shape[1]},) for all prompts or "
            f"{tuple(own.shape)}."
        )
    if not bool(given.isfinite().all()):
        raise EditError(f"{name} holds NaN or infinity; there is no path to take from there.")
    kind = torch.promote_types(own.dtype, torch.float32)
    return given.to(own.device, kind).expand_as(own)
