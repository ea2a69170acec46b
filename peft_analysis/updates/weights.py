"""The parameters of a model, wherever they lie, read one at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from peft_analysis.updates.entry import Layout


class Weights(Mapping[str, Tensor]):
    """Parameters by name, each read when it is asked for and never kept.

    Attributes:
        source: where they come from, in words, for messages.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], Tensor]],
        *,
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
        layouts: Mapping[str, Layout] | None = None,
        source: str = "weights",
    ) -> None:
        self._readers = dict(readers)
        self._shapes = dict(shapes)
        self._dtypes = dict(dtypes)
        self._layouts = dict(layouts or {})
        self.source = source

    @classmethod
    def of_module(cls, model: nn.Module) -> "Weights":
        """The parameters of a live module, without a copy."""
        parameters = dict(model.named_parameters())
        transposed = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None
        }
        return cls(
            {name: value.detach for name, value in parameters.items()},
            shapes={name: value.shape for name, value in parameters.items()},
            dtypes={name: value.dtype for name, value in parameters.items()},
            layouts=dict.fromkeys(transposed, "in_out"),
            source=type(model).__name__,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter, without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter is stored in, without reading it."""
        return self._dtypes[name]

    def layout(self, name: str) -> Layout:
        """Whether a matrix is stored (out, in), (in, out) or is none; see `Entry.layout`."""
        if name in self._layouts:
            return self._layouts[name]
        return "out_in" if len(self._shapes[name]) >= 2 else "other"
