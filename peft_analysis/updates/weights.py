"""The parameters of a model, wherever they lie, read one at a time."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.entry import Layout

if TYPE_CHECKING:
    from peft_analysis.updates.weight_update import WeightUpdate


class Weights(Mapping[str, Tensor]):
    """Parameters by name, each read when it is asked for and never kept.

    Floating-point buffers that a checkpoint stores (the running mean of a batch norm) count as parameters:
    without them a model is not restored. Iteration gives each parameter once. Other names of a tied
    parameter are not listed; `in`, `[]`, `shape`, `dtype` and `layout` know them.

    Attributes:
        source: where they come from, in words, for messages.
        tied: for each other name of a tied parameter, the name under which it is listed.
        embeddings: names of parameters with a row for each token or position, where a model told.
        tokens: those of them with a row for each token.
        skipped: names that were found or may be, and are no weights, each with the reason.
        ignored: regular expressions of names that the model does not read from a checkpoint.
        model: the module whose names these are, live or on the meta device; None where no config tells it.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], Tensor]],
        *,
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
        layouts: Mapping[str, Layout] | None = None,
        source: str = "weights",
        tied: Mapping[str, str] | None = None,
        embeddings: frozenset[str] = frozenset(),
        tokens: frozenset[str] = frozenset(),
        skipped: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
        model: nn.Module | None = None,
        mapped: frozenset[str] = frozenset(),
    ) -> None:
        self._readers = dict(readers)
        self._shapes = dict(shapes)
        self._dtypes = dict(dtypes)
        self._layouts = dict(layouts or {})
        self.source = source
        self.tied = dict(tied or {})
        self.embeddings = embeddings
        self.tokens = tokens
        self.skipped = dict(skipped or {})
        self.ignored = tuple(ignored)
        self.model = model
        self._mapped = mapped

    @classmethod
    def of(
        cls,
        source: "nn.Module | Weights | str | os.PathLike[str] | Mapping[str, Tensor]",
        *,
        like: "Weights | None" = None,
    ) -> "Weights":
        """The weights of a live module, of a model's folder, of a file, or of tensors in memory.

        Args:
            source: where they are.
            like: weights of the same model; files without a config are named and laid out as these.

        Raises:
            UpdateError: nothing is there, it holds no weights, it is cut off, or it is not safe to read.
        """
        if isinstance(source, Weights):
            return source
        if isinstance(source, nn.Module):
            return cls.of_module(source)
        if isinstance(source, Mapping):
            return cls.of_tensors(source)
        if isinstance(source, str | os.PathLike):
            from peft_analysis.updates.folders import weights_at

            return weights_at(Path(source).expanduser(), None if like is None else like.model)
        raise UpdateError(
            f"no weights can be read from a {type(source).__name__}; give a module, a folder or a file"
        )

    @classmethod
    def of_module(cls, model: nn.Module) -> "Weights":
        """The parameters and floating-point buffers of a live module, without a copy."""
        from peft_analysis.updates.anatomy import anatomy

        parts = anatomy(model)
        values: dict[str, Tensor] = {**parts.parameters, **parts.buffers}
        return cls(
            {name: partial(_live, name, value) for name, value in values.items()},
            shapes={name: value.shape for name, value in values.items()},
            dtypes={name: value.dtype for name, value in values.items()},
            layouts=parts.layouts,
            source=type(model).__name__,
            tied=parts.tied,
            embeddings=parts.embeddings,
            tokens=parts.tokens,
            skipped=parts.skipped,
            ignored=parts.ignored,
            model=model,
        )

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], *, source: str = "tensors in memory", **facts: Any
    ) -> "Weights":
        """Tensors in memory by name; `facts` are further arguments of `Weights` (layouts, tied, …)."""
        wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if wrong:
            raise UpdateError(f"{source}: {', '.join(wrong[:5])} is no tensor; give tensors by name")
        return cls(
            {name: value.detach for name, value in tensors.items()},
            shapes={name: value.shape for name, value in tensors.items()},
            dtypes={name: value.dtype for name, value in tensors.items()},
            source=source,
            **facts,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[self.name_of(name)]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers or name in self.tied

    def __repr__(self) -> str:
        return f"Weights({len(self)} parameters, source={self.source!r})"

    def name_of(self, name: str) -> str:
        """The name under which a parameter is listed: itself, unless it is tied to another."""
        return name if name in self._readers else self.tied.get(name, name)

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in blocks of so many rows; of a file that is mapped, only one block is in memory."""
        name = self.name_of(name)
        value = None if name in self._mapped else self[name]
        for begin in range(0, self._shapes[name][0], count):
            yield (self[name] if value is None else value)[begin : begin + count]

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter, without reading it."""
        return self._shapes[self.name_of(name)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter is stored in, without reading it."""
        return self._dtypes[self.name_of(name)]

    def layout(self, name: str) -> Layout:
        """Whether a matrix is stored (out, in), (in, out) or is none; see `Entry.layout`."""
        name = self.name_of(name)
        if name in self._layouts:
            return self._layouts[name]
        return "out_in" if len(self._shapes[name]) >= 2 else "other"

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """The same weights under other names: `names` gives the new name of each old one; others stay."""

        def new(name: str) -> str:
            return names.get(name, name)

        return Weights(
            {new(name): reader for name, reader in self._readers.items()},
            shapes={new(name): shape for name, shape in self._shapes.items()},
            dtypes={new(name): dtype for name, dtype in self._dtypes.items()},
            layouts={new(name): layout for name, layout in self._layouts.items()},
            source=self.source,
            tied={new(other): new(name) for other, name in self.tied.items()},
            embeddings=frozenset(new(name) for name in self.embeddings),
            tokens=frozenset(new(name) for name in self.tokens),
            skipped={new(name): reason for name, reason in self.skipped.items()},
            ignored=self.ignored,
            mapped=frozenset(new(name) for name in self._mapped),
        )

    def plus(self, update: "WeightUpdate") -> "Weights":
        """These weights with an update added, each sum taken in float32 or wider when it is read.

        Raises:
            UpdateError: the update names parameters that are not here.
        """
        absent = [name for name in update if name not in self]
        if absent:
            raise UpdateError(f"{self.source} has no {', '.join(absent[:5])}, which {update.source} changes")
        changed = set(update)
        tied = {other: name for other, name in self.tied.items() if other not in changed}
        names = [*self, *(name for name in changed if name in self.tied)]
        widened = {name: torch.promote_types(self.dtype(name), torch.float32) for name in changed}
        return Weights(
            {
                name: partial(_sum, self, update, name)
                if name in changed
                else partial(self.__getitem__, name)
                for name in names
            },
            shapes={name: self.shape(name) for name in names},
            dtypes={name: widened.get(name, self.dtype(name)) for name in names},
            layouts={name: self.layout(name) for name in names},
            source=f"{self.source} + {update.source}",
            tied=tied,
            embeddings=self.embeddings,
            tokens=self.tokens,
            skipped=self.skipped,
            ignored=self.ignored,
            model=self.model,
        )

    @classmethod
    def joined(cls, parts: "Mapping[str, Weights]", *, source: str) -> "Weights":
        """Several models as one, each under its own name: 'unet.', 'text_encoder.'."""
        named = [
            weights.renamed({name: f"{part}.{name}" for name in (*weights, *weights.tied, *weights.skipped)})
            for part, weights in parts.items()
        ]

        def merged(attribute: str) -> dict[str, Any]:
            return {key: value for weights in named for key, value in getattr(weights, attribute).items()}

        return cls(
            merged("_readers"),
            shapes=merged("_shapes"),
            dtypes=merged("_dtypes"),
            layouts=merged("_layouts"),
            source=source,
            tied=merged("tied"),
            embeddings=frozenset().union(*(weights.embeddings for weights in named)),
            tokens=frozenset().union(*(weights.tokens for weights in named)),
            skipped=merged("skipped"),
            ignored=[pattern for weights in named for pattern in weights.ignored],
            mapped=frozenset().union(*(weights._mapped for weights in named)),
        )

    def why_skipped(self, name: str) -> str | None:
        """Why a name that a checkpoint holds is no weight of this model; None if it is one."""
        if name in self.skipped:
            return self.skipped[name]
        if name not in self and any(re.search(pattern, name) for pattern in self.ignored):
            return "the model does not read it from a checkpoint"
        return None


def _sum(weights: Weights, update: "WeightUpdate", name: str) -> Tensor:
    before = weights[name]
    wide = torch.promote_types(before.dtype, torch.float32)
    return before.to(wide) + update.dense(name).to(before.device, wide)


def _live(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise UpdateError(f"{name} has no values (meta device); load the model without offloading")
    return value.detach()
