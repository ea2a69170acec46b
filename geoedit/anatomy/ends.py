"""The two ends of a model: token embedding, final norm, unembedding."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from geoedit.anatomy.kinds import adapted, is_norm, is_projection, rows, same_values
from geoedit.anatomy.parts import Stack
from geoedit.anatomy.trace import Call, Recording
from geoedit.errors import EditError


def within(path: str, parent: str) -> bool:
    """Say whether a module path lies inside another."""
    return path.startswith(f"{parent}.")


def output_of(call: Call) -> Tensor:
    """Return what a call gave."""
    if call.output is None:
        raise EditError(f"{call.path} returns no tensor.")
    return call.output


def final_norm(path: str, last: Call, record: Recording) -> Call | None:
    """Return the call of the norm whose input rows are rows of the last block's output."""
    states = rows(output_of(last))
    for call in record.calls[record.calls.index(last) + 1 :]:
        if (
            call.input is None
            or call.output is None
            or call.input.shape != call.output.shape
            or within(call.path, path)
        ):
            continue
        if call.input.shape[-1] != states.shape[-1] or not call.input.is_floating_point():
            continue
        entered = rows(call.input)[:8]
        consumed = all(bool((states == row.to(states)).all(-1).any()) for row in entered)
        if consumed and is_norm(call.module, states.shape[-1], call.input):
            return call
    return None


def _path_of(modules: Mapping[str, nn.Module], wanted: object) -> str | None:
    return next((path for path, module in modules.items() if path and module is wanted), None)


def _asked(model: nn.Module, method: str) -> object:
    ask = getattr(model, method, None)
    if not callable(ask):
        return None
    try:
        return ask()
    except (NotImplementedError, AttributeError):
        return None


def token_table(model: nn.Module, record: Recording, first: Call, ids: list[Tensor]) -> Call | None:
    """Return the call of the module that turned token ids into states for the block call `first`.

    Of the modules that were given the ids themselves, the one that the model names as its input embedding, or
    else the first (a table of positions may be given the ids too, after it).
    """
    before = record.calls[: record.calls.index(first)]
    given = [
        call
        for call in before
        if call.input is not None
        and any(same_values(call.input, t) for t in ids)
        and call.output is not None
        and call.output.is_floating_point()
        and not any(within(other.path, call.path) for other in before)
    ]
    latest = [call for call in given if same_values(call.input, given[-1].input)]
    asked = _asked(model, "get_input_embeddings")
    named = [call for call in latest if call.module is asked]
    return next(iter(named or latest), None)


def embedding(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    stacks: Mapping[str, Stack],
    main: str | None,
    calls: Mapping[str, list[Call]],
) -> str | None:
    """Return the path of the token embedding: the main stack's, or else the model's own answer."""
    if main is not None and stacks[main].embedding_path is not None:
        return stacks[main].embedding_path
    asked = _path_of(modules, _asked(model, "get_input_embeddings"))
    widths = {stack.width for stack in stacks.values()}
    for call in calls.get(asked, []) if asked is not None else []:
        if call.output is not None and call.output.ndim == 3 and call.output.shape[-1] in widths:
            return asked
    return next((s.embedding_path for s in stacks.values() if s.embedding_path is not None), None)


def unembedding(
    model: nn.Module, modules: Mapping[str, nn.Module], stacks: Mapping[str, Stack], record: Recording
) -> str | None:
    """Return the path of the projection onto the vocabulary: the model's answer, or the last of that size."""
    asked = _path_of(modules, _asked(model, "get_output_embeddings"))
    if asked is not None:
        return asked
    sizes = {
        int(s.embedding.weight.shape[0]) for s in stacks.values() if isinstance(s.embedding, nn.Embedding)
    }
    hidden = adapted(modules)
    for call in reversed(record.calls):
        if (
            call.path not in hidden
            and is_projection(call.module)
            and call.output is not None
            and call.output.shape[-1] in sizes
        ):
            return call.path
    return None


def feeds(stacks: Mapping[str, Stack], record: Recording, unembedding: str | None) -> str | None:
    """Return the stack that ran last before the unembedding."""
    if unembedding is None:
        return None
    order = [call.path for call in record.calls]
    if unembedding not in order:
        return None
    end = order.index(unembedding)
    last = {
        name: max((i for i, path in enumerate(order[:end]) if path == stack.blocks[-1].path), default=-1)
        for name, stack in stacks.items()
    }
    best = max(last, key=lambda name: last[name])
    return best if last[best] >= 0 else None
