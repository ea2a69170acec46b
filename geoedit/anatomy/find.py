"""`anatomy(model)`: one small forward pass, then each kind of block probed once."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from geoedit.anatomy.ends import embedding, feeds, final_norm, output_of, token_table, unembedding, within
from geoedit.anatomy.heads import count_heads
from geoedit.anatomy.inputs import Inputs, attempts, given
from geoedit.anatomy.kinds import is_projection, rows
from geoedit.anatomy.parts import HOW_TO_NAME, Anatomy, Block, Location, Stack
from geoedit.anatomy.probe import Addend, Findings, probe
from geoedit.anatomy.trace import Call, Recording, input_tensor, recording, undisturbed
from geoedit.errors import EditError

_known: weakref.WeakKeyDictionary[nn.Module, tuple[int, Anatomy]] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module, inputs: Any = None) -> Anatomy:
    """Find blocks, streams, heads, norms and (un)embedding by structure and behaviour, never by name.

    A tiny forward pass (`inputs`, a mapping, tuple or tensor, or else a few random tokens, pixels or frames)
    shows which lists hold residual blocks: each maps a stream of shape (batch, tokens, width) to one of the
    same shape. Then one block of each kind is run again with single tensors touched. An output a is what the
    block *adds* if a + e in its place moves a sum (the block's output, or the input of a norm) by c * e, for
    one number c. Where touching every second token of the block's input moves the others in a, it is
    attention's; the last addend that does not mix tokens is the MLP's. The projection that makes it has the
    heads (or the MLP's hidden layer) as its input. The model is left as it was; the result is remembered
    until the model's modules change.

    Args:
        model: Any module that holds a list of residual blocks; quantised, adapted (PEFT) and dispatched ones
            too.
        inputs: What to call the model with, where a guess from its signature and configuration does not do.

    Raises:
        EditError: no forward pass worked, or no residual blocks were found; the message lists what was.
    """
    if not isinstance(model, nn.Module):
        raise EditError(f"anatomy() needs a torch.nn.Module, not {type(model).__name__}.")
    state = hash(tuple((name, id(module), type(module)) for name, module in model.named_modules()))
    known = _known.get(model)
    if inputs is None and known is not None and known[0] == state:
        return known[1]
    with undisturbed(model):
        found = _find(model, inputs)
    _known[model] = (state, found)
    return found


def _signature(block: nn.Module) -> tuple[object, ...]:
    return tuple(
        (name, type(module), tuple(tuple(p.shape) for p in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def _find(model: nn.Module, inputs: Any) -> Anatomy:
    modules = dict(model.named_modules())
    if any(p.device.type == "meta" for p in model.parameters()) and not any(
        hasattr(m, "_hf_hook") for m in modules.values()
    ):
        raise EditError(
            "The model's weights are on the meta device, so it cannot run; load its weights first."
        )
    lists = {
        path: {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
        for path, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    children = {child: module for items in lists.values() for child, module in items.items()}
    inside = {p for p in modules if any(within(p, child) for child in children)}
    watched = {p: m for p, m in modules.items() if p and (p in children or p not in inside)}
    record, ids = _forward(model, inputs, watched, frozenset(children))
    calls = record.by_path()
    chosen = {path: items for path, items in lists.items() if _are_blocks(items, calls)}
    chosen = {
        path: items
        for path, items in chosen.items()
        if not any(within(path, child) for other in chosen if other != path for child in chosen[other])
    }
    if not chosen:
        raise EditError(_nothing(model, lists, calls))
    names = _names(list(chosen))
    stacks: dict[str, Stack] = {}
    for path, items in chosen.items():
        stack = _stack(model, path, names[path], items, record, calls, ids)
        if len(chosen) == 1:
            stack = Stack(**{**vars(stack), "name": "decoder" if stack.causal else "encoder"})
        stacks[stack.name] = stack
    unembedding_path = unembedding(model, modules, stacks, record)
    main = next(iter(stacks)) if len(stacks) == 1 else feeds(stacks, record, unembedding_path)
    embedding_path = embedding(model, modules, stacks, main, calls)
    return Anatomy(
        stacks=stacks,
        main=main,
        embedding=modules.get(embedding_path) if embedding_path is not None else None,
        embedding_path=embedding_path,
        unembedding=modules.get(unembedding_path) if unembedding_path is not None else None,
        unembedding_path=unembedding_path,
        modules={p: m for p, m in modules.items() if p},
    )


def _forward(
    model: nn.Module, inputs: Any, watched: Mapping[str, nn.Module], keep: frozenset[str]
) -> tuple[Recording, list[Tensor]]:
    tries: list[tuple[str, Inputs]] = (
        [("the given inputs", given(inputs))] if inputs is not None else attempts(model)
    )
    failures = []
    for words, (args, kwargs) in tries:
        try:
            with recording(watched, keep_arguments=keep) as record:
                model(*args, **kwargs)
        except Exception as error:
            failures.append(
                f"{words}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            )
            continue
        tensors = [
            t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()
        ]
        return record, tensors
    listed = "\n  ".join(failures) or "nothing that it accepts could be guessed"
    raise EditError(
        f"No forward pass of {type(model).__name__} worked, so its parts cannot be watched. Tried:\n"
        f"  {listed}\nGive an example of what it takes: anatomy(model, inputs={{...}})."
    )


def _are_blocks(items: Mapping[str, nn.Module], calls: Mapping[str, list[Call]]) -> bool:
    ran = [(module, calls[path][0]) for path, module in items.items() if path in calls]
    if not ran:
        return False
    for module, call in ran:
        before, after = call.input, call.output
        if before is None or after is None or before.shape != after.shape or not before.is_floating_point():
            return False
        if (
            before.ndim < 2
            or rows(before).shape[0] < 2
            or sum(is_projection(m) for m in module.modules()) < 2
        ):
            return False
    return len({call.output.shape[-1] for _, call in ran if call.output is not None}) == 1


def _nothing(
    model: nn.Module, lists: Mapping[str, Mapping[str, nn.Module]], calls: Mapping[str, list[Call]]
) -> str:
    lines = []
    for path, items in lists.items():
        kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in items.values()))
        shapes = next(
            (
                f"{tuple(c.input.shape)} -> {tuple(c.output.shape)}"
                for p in items
                for c in calls.get(p, [])
                if c.input is not None and c.output is not None
            ),
            "did not run",
        )
        lines.append(f"{path or '(the model itself)'}: {len(items)} x {kinds}, {shapes}")
    listed = "\n  ".join(lines[:20]) or "(none)"
    return (
        f"No residual blocks found in {type(model).__name__}: a list of modules that each turn states "
        "(batch, tokens, width) into states of the same shape, with at least two projections. "
        f"Lists of modules seen:\n  {listed}\n{HOW_TO_NAME}"
    )


def _names(paths: list[str]) -> dict[str, str]:
    """Name each stack by the first part of its path that tells it from the others."""
    split = [path.split(".") for path in paths]
    shared = 0
    while len(split) > 1 and all(len(s) > shared and s[shared] == split[0][shared] for s in split):
        shared += 1
    names: dict[str, str] = {}
    for path, parts in zip(paths, split, strict=True):
        part = parts[min(shared, len(parts) - 1)]
        if part.isdigit() and shared:
            part = f"{parts[shared - 1]}.{part}"
        name = re.sub(r"_(model|tower|encoder|transformer)$", "", part) or part
        names[path] = path if name in names.values() else name
    return names


def _stack(
    model: nn.Module,
    path: str,
    name: str,
    items: Mapping[str, nn.Module],
    record: Recording,
    calls: Mapping[str, list[Call]],
    ids: list[Tensor],
) -> Stack:
    ran = [p for p in items if p in calls]
    width = output_of(calls[ran[0]][0]).shape[-1]
    kinds: dict[tuple[object, ...], Findings] = {}
    blocks = []
    for index, (block_path, module) in enumerate(items.items()):
        kind = _signature(module)
        if kind not in kinds:
            source = block_path if block_path in record.arguments else ran[0]
            kinds[kind] = _probed(block_path, module, *record.arguments[source])
        times = len(calls.get(block_path, ()))
        blocks.append(_block(model, index, block_path, module, width, kinds[kind], times))
    final = final_norm(path, calls[ran[-1]][-1], record)
    table = token_table(model, record, calls[ran[0]][0], ids)
    state = output_of(calls[ran[0]][0])
    count = rows(state).shape[0]
    return Stack(
        name=name,
        path=path,
        blocks=tuple(blocks),
        width=width,
        causal=any(f.causal for f in kinds.values()),
        token_axis=next((i for i, size in enumerate(state.shape[:-1]) if size == count), 1),
        final_norm=final.module if final else None,
        final_norm_path=final.path if final else None,
        embedding=table.module if table else None,
        embedding_path=table.path if table else None,
    )


def _probed(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Findings:
    if input_tensor(args, kwargs) is None:
        return Findings(None, None, None, None, {}, (), False)
    try:
        return probe(module, args, kwargs)
    except Exception as error:
        reason = f"the block could not be run alone ({type(error).__name__}: {error})"
        why = dict.fromkeys(("attention_out", "heads", "mlp_hidden", "mlp_out"), reason)
        return Findings(None, None, None, None, {}, (), False, why)


def _block(
    model: nn.Module, index: int, path: str, module: nn.Module, width: int, found: Findings, calls: int
) -> Block:
    why = dict(found.why)

    def place(inner: str | None, side: str, gain: float = 1.0) -> Location | None:
        if inner is None:
            return None
        size = found.widths[inner][0 if side == "input" else 1]
        target = module.get_submodule(inner)
        if side == "input":
            return Location(f"{path}.{inner}", target, "input", size, order=index)
        return Location(f"{path}.{inner}", target, "output", size, order=index, gain=gain)

    def added(addend: Addend | None) -> Location | None:
        return None if addend is None else place(addend.path, "output", addend.gain)

    heads = place(found.attention_projection, "input")
    count = None
    if heads is not None and found.attention_projection is not None:
        count = count_heads(model, module, found.attention_projection, heads.width)
        if count is None:
            why["heads"] = (
                "neither the attention module nor a configuration says how many heads share "
                f"{heads.path}:input ({heads.width} features)"
            )
            heads = None
    return Block(
        index=index,
        path=path,
        module=module,
        width=width,
        calls=calls,
        attention_out=added(found.attention),
        heads=heads,
        mlp_hidden=place(found.mlp_projection, "input"),
        mlp_out=added(found.mlp),
        num_heads=count,
        head_dim=None if heads is None or count is None else heads.width // count,
        why=why,
    )
