"""What an anatomy is made of: locations (where a hook goes), blocks, stacks, and the whole."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from geoedit.errors import EditError

if TYPE_CHECKING:
    from geoedit.site import Site

STREAMS = ("residual_in", "attention_out", "heads", "mlp_hidden", "mlp_out", "residual_out", "embedding")
HOW_TO_NAME = (
    'To reach any other place name a module: Site(module="path") for its output, Site(module="path:input") '
    "for its input."
)


@dataclass(frozen=True)
class Location:
    """Where a state is read or written: the first tensor that goes into a module, or that comes out.

    `width` is the size of the state, a head's for one head (0: not known, for a module named by its path),
    `features` one head's slice of that axis, `order` rough execution order (the block's index; -1 before
    all blocks). The residual stream receives `gain` times the value at an attention_out or mlp_out (1 in
    most models). A few models flatten (batch, tokens, width) to (batch * tokens, width) around their MLP; a
    hook has to expect that.
    """

    path: str
    module: nn.Module = field(compare=False, repr=False)
    side: Literal["input", "output"]
    width: int
    features: slice | None = field(default=None, hash=False)
    order: int = 0
    gain: float = 1.0

    def __str__(self) -> str:
        part = "" if self.features is None else f"[{self.features.start}:{self.features.stop}]"
        return f"{self.path}{':input' if self.side == 'input' else ''}{part}"


@dataclass(frozen=True, eq=False)
class Block:
    """One residual block; a stream that it does not have is None, and `why` says why.

    `calls` is how often one forward pass runs it (more than once where layers share their weights).
    """

    index: int
    path: str
    module: nn.Module = field(repr=False)
    width: int
    attention_out: Location | None = None
    heads: Location | None = None
    mlp_hidden: Location | None = None
    mlp_out: Location | None = None
    calls: int = 1
    num_heads: int | None = None
    head_dim: int | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def residual_in(self) -> Location:
        """The residual stream as it enters the block."""
        return Location(self.path, self.module, "input", self.width, order=self.index)

    @property
    def residual_out(self) -> Location:
        """The residual stream as it leaves the block."""
        return Location(self.path, self.module, "output", self.width, order=self.index)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that exist in this block."""
        inner = (
            name
            for name in ("attention_out", "heads", "mlp_hidden", "mlp_out")
            if getattr(self, name) is not None
        )
        return ("residual_in", *inner, "residual_out")

    def location(self, stream: str, head: int | None = None) -> Location:
        """Return the location of `stream`, or of one head; EditError with the reason if there is none."""
        if stream not in STREAMS or stream == "embedding":
            raise EditError(
                f"No stream {stream!r} in a block; streams are {', '.join(STREAMS[:-1])}. {HOW_TO_NAME}"
            )
        found: Location | None = getattr(self, stream)
        if found is None:
            reason = self.why.get(stream, "no such place was found")
            raise EditError(
                f"Block {self.index} ({self.path}, {type(self.module).__name__}) has no {stream}: {reason}. "
                f"It has {', '.join(self.streams)}. {HOW_TO_NAME}"
            )
        if head is None:
            return found
        if stream != "heads" or self.num_heads is None or self.head_dim is None:
            raise EditError(
                f"head={head} needs stream='heads', not {stream!r}: only there are the heads still apart."
            )
        if not -self.num_heads <= head < self.num_heads:
            raise EditError(
                f"No head {head} in block {self.index}: it has {self.num_heads}, 0 to {self.num_heads - 1}."
            )
        start = (head % self.num_heads) * self.head_dim
        return Location(
            found.path,
            found.module,
            found.side,
            self.head_dim,
            slice(start, start + self.head_dim),
            found.order,
        )


@dataclass(frozen=True, eq=False)
class Stack:
    """A chain of residual blocks that share one residual stream of size `width`."""

    name: str
    path: str
    blocks: tuple[Block, ...]
    width: int
    causal: bool
    token_axis: int = 1
    final_norm: nn.Module | None = field(default=None, repr=False)
    final_norm_path: str | None = None
    embedding: nn.Module | None = field(default=None, repr=False)
    embedding_path: str | None = None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of a model are; print it for a table."""

    stacks: Mapping[str, Stack]
    main: str | None
    embedding: nn.Module | None = field(default=None, repr=False)
    embedding_path: str | None = None
    unembedding: nn.Module | None = field(default=None, repr=False)
    unembedding_path: str | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    def stack(self, name: str | None = None) -> Stack:
        """Return the named stack, or the main one; raises EditError where the name is unknown or needed."""
        chosen = self.main if name is None else name
        listed = ", ".join(f"{s.name!r} ({len(s.blocks)} blocks)" for s in self.stacks.values())
        if chosen is None:
            raise EditError(
                f"This model has several stacks of blocks: {listed}. Say which with Site(..., stack=...)."
            )
        if chosen not in self.stacks:
            raise EditError(f"No stack {chosen!r}; this model has {listed}.")
        return self.stacks[chosen]

    def locate(self, site: Site) -> Location:
        """Return where a hook for `site` goes; EditError that names what exists if the site does not."""
        if site.module is not None:
            return self._named(site.module)
        if site.stream == "embedding":
            return self._embedding(site.stack)
        stack = self.stack(site.stack)
        if stack.token_axis != 1:
            raise EditError(
                f"Stack {stack.name!r} ({stack.path}) keeps its states as (tokens, batch, width); sites read "
                "(batch, tokens, width). Build the model with batch_first=True where it has that."
            )
        count = len(stack.blocks)
        if site.block is None:
            raise EditError(
                f"A site of stream {site.stream!r} needs a block: 0 to {count - 1} (negative: from the end)."
            )
        if not -count <= site.block < count:
            raise EditError(
                f"No block {site.block}: stack {stack.name!r} ({stack.path}) has {count}, 0 to {count - 1} "
                f"(or -{count} to -1). {HOW_TO_NAME}"
            )
        return stack.blocks[site.block].location(site.stream, site.head)

    def sites(self, streams: Sequence[str] = ("residual_out",), token: str | int = "last") -> list[Site]:
        """Return a Site for each stack, each block and each of `streams` that exists there, in this order."""
        from geoedit.site import Site

        unknown = [name for name in streams if name not in STREAMS]
        if unknown:
            raise EditError(f"No stream {unknown[0]!r}; streams are {', '.join(STREAMS)}.")
        found = []
        for stack in self.stacks.values():
            name = None if stack.name == self.main else stack.name
            if "embedding" in streams and stack.embedding_path is not None:
                found.append(Site(stream="embedding", token=token, stack=name))
            found += [
                Site(block=block.index, stream=stream, token=token, stack=name)
                for block in stack.blocks
                for stream in STREAMS
                if stream in streams and stream in block.streams
            ]
        return found

    def _embedding(self, name: str | None) -> Location:
        module, path = self.embedding, self.embedding_path
        if name is not None:
            stack = self.stack(name)
            module, path = stack.embedding, stack.embedding_path
        if module is None or path is None:
            raise EditError(f"No token embedding was found in this model. {HOW_TO_NAME}")
        weight = getattr(module, "weight", None)
        width = int(weight.shape[-1]) if weight is not None and weight.ndim == 2 else self.stack(name).width
        return Location(path, module, "output", width, order=-1)

    def _named(self, path: str) -> Location:
        name, _, side = path.partition(":")
        if side not in ("", "input", "output"):
            raise EditError(
                f"Module path {path!r} ends in {side!r}; write 'path' for output, 'path:input' for input."
            )
        if name not in self.modules:
            close = difflib.get_close_matches(name, self.modules, n=3, cutoff=0.5)
            tail = name.rsplit(".", 1)[-1]
            close += [p for p in self.modules if p.rsplit(".", 1)[-1] == tail and p not in close][
                : 3 - len(close)
            ]
            hint = (
                f" Near it: {', '.join(close)}." if close else " See model.named_modules() for those that do."
            )
            raise EditError(f"No module {name!r} in this model.{hint}")
        order = -1
        for stack in self.stacks.values():
            for block in stack.blocks:
                if name == block.path or name.startswith(f"{block.path}."):
                    order = block.index
        return Location(name, self.modules[name], "input" if side == "input" else "output", 0, order=order)

    def __str__(self) -> str:
        lines = [f"embedding    {self.embedding_path or '-'}"]
        for stack in self.stacks.values():
            kind = "causal" if stack.causal else "bidirectional"
            star = " (main)" if stack.name == self.main else ""
            lines.append(
                f"stack {stack.name!r}{star}: {len(stack.blocks)} blocks at {stack.path}, "
                f"width {stack.width}, {kind}"
            )
            for group in _alike(stack.blocks):
                first, last = group[0], group[-1]
                span = f"block {first.index}" if len(group) == 1 else f"blocks {first.index}-{last.index}"
                lines.append(f"  {span}  {type(first.module).__name__}  e.g. {first.path}")
                for stream in ("attention_out", "heads", "mlp_hidden", "mlp_out"):
                    place: Location | None = getattr(first, stream)
                    if place is None:
                        lines.append(f"    {stream:<14}- {first.why.get(stream, '')}")
                    else:
                        note = f"{place.width}"
                        if stream == "heads":
                            note = f"{first.num_heads} x {first.head_dim}"
                        note += "" if abs(place.gain - 1) < 0.01 else f", added times {place.gain:.4g}"
                        lines.append(f"    {stream:<14}{str(place)[len(first.path) + 1 :]}  ({note})")
            lines.append(f"  final norm  {stack.final_norm_path or '-'}")
        lines.append(f"unembedding  {self.unembedding_path or '-'}")
        return "\n".join(lines)


def _alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group neighbouring blocks whose places have the same names and sizes."""

    def key(block: Block) -> tuple[object, ...]:
        places = (block.attention_out, block.heads, block.mlp_hidden, block.mlp_out)
        return (type(block.module), *((str(p)[len(block.path) :], p.width) if p else None for p in places))

    groups: list[list[Block]] = []
    for block in blocks:
        if groups and key(groups[-1][0]) == key(block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups
