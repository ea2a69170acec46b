"""Tell one model from another, whatever precision it was loaded in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError

_SAMPLES = 32
_DIGEST_SAMPLES = 256
_STRIDE = 2_654_435_761  # odd and large: spreads the samples over the whole matrix
_TOLERANCE = 2**-7  # twice the spacing of bfloat16, relative


@dataclass(frozen=True)
class Fingerprint:
    """What a model is, as far as a state taken from it needs to know.

    Attributes:
        kind: Model type of the configuration, or the class name where there is none.
        sizes: Shape of the sampled matrix, and the sizes that the configuration states.
        samples: Weights sampled from the embedding (or the first matrix, in a model without one), in float32.
            Empty where the weights are not in memory.
    """

    kind: str
    sizes: Mapping[str, int]
    samples: tuple[float, ...]

    def difference(self, other: Fingerprint) -> str | None:
        """Say in words what differs from another model; None when they agree."""
        if self.kind != other.kind:
            return f"it is a {self.kind} and the model is a {other.kind}"
        for name in sorted(self.sizes.keys() & other.sizes.keys()):
            if self.sizes[name] != other.sizes[name]:
                return f"its {name} is {self.sizes[name]} and the model's {other.sizes[name]}"
        if not self.samples or not other.samples:
            return None
        size = max(map(abs, (*self.samples, *other.samples)), default=0.0)
        for mine, theirs in zip(self.samples, other.samples, strict=False):
            if not math.isclose(mine, theirs, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * size / 16):
                return "the sizes agree, but the weights of the embedding differ"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return {**asdict(self), "sizes": dict(self.sizes), "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fingerprint:
        """Rebuild from `to_dict`.

        Raises:
            EditError: a field is missing or of the wrong type.
        """
        try:
            samples = tuple(float(value) for value in fields["samples"])
            sizes = {str(name): int(value) for name, value in fields["sizes"].items()}
            return cls(str(fields["kind"]), sizes, samples)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EditError(f"This is no model fingerprint: {fields!r} ({error!r}).") from error

    def __hash__(self) -> int:
        return hash((self.kind, tuple(sorted(self.sizes.items())), self.samples))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Take the fingerprint of a model: its kind, its sizes, and 32 weights of its token embedding.

    The same model agrees with itself in float32, bfloat16 and float16, with and without an adapter or a head
    around it. A fine-tune that leaves the embedding alone agrees with its origin: states mean nearly the same
    in both.

    Args:
        model: Any module with parameters.

    Raises:
        EditError: the model has no floating-point matrix.
    """
    base = _unwrapped(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", None) or type(base).__name__
    name, matrix = _matrix(base)
    sizes = {f"{name} rows": matrix.shape[0], f"{name} columns": matrix[0].numel()}
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        value = getattr(text, key, None)
        if isinstance(value, int):
            sizes[key] = value
    return Fingerprint(kind, sizes, _sampled(matrix))


def weights_digest(model: nn.Module) -> str:
    """A hash over samples and sums of every weight: a rank-one change anywhere gives another one."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        flat = weight.detach().flatten()
        if flat.is_meta or not flat.numel():
            continue
        digest.update(flat[:: max(flat.numel() // _DIGEST_SAMPLES, 1)].double().cpu().numpy().tobytes())
        digest.update(str(float(flat.double().sum())).encode())
    return digest.hexdigest()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Look through adapters and parallel wrappers."""
    base: Any = model
    while True:
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        elif type(base).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
            base = getattr(base, "module", None) or base._orig_mod
        else:
            return base


def _matrix(model: nn.Module) -> tuple[str, Tensor]:
    embedding, ask = None, getattr(model, "get_input_embeddings", None)
    if callable(ask):
        try:
            embedding = ask()
        except (NotImplementedError, AttributeError):
            embedding = None
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() >= 2:
        return "embedding", weight.detach()
    for parameter in model.parameters():
        if parameter.dim() >= 2 and min(parameter.shape[:2]) > 1 and parameter.is_floating_point():
            return "first matrix", parameter.detach()
    raise EditError(f"{type(model).__name__} has no floating-point matrix to take a fingerprint from.")


def _sampled(matrix: Tensor) -> tuple[float, ...]:
    if matrix.is_meta or not matrix.is_floating_point():
        return ()
    places = [(index * _STRIDE) % matrix.numel() for index in range(1, _SAMPLES + 1)]
    values = matrix.reshape(-1)[torch.tensor(places, device=matrix.device)]
    return tuple(values.float().cpu().tolist())
