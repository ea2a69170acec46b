"""Norm layers as arithmetic, so that forward mode is right when it is differentiated again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from manifolds.errors import ManifoldError


class WrittenOut(TorchFunctionMode):
    """Runs layer norms, instance norms and SiLU as written-out arithmetic.

    PyTorch's formulas for the forward derivatives of `layer_norm` and of `instance_norm` are wrong when they
    are differentiated in turn (pytorch issue 196700, open as of torch 2.13); those of means, squares and
    roots are right, and so is `group_norm`'s. The backward formula of `silu` has no forward derivative.
    The derivatives of `group_norm` want its input in one piece, which transposed tokens are not.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **(kwargs or {}))
        if func in (F.group_norm, torch.group_norm) and args:
            return func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        if func is F.silu:
            return _silu(*args, **(kwargs or {}))
        if func is F.instance_norm:
            return _instance_norm(*args, **(kwargs or {}))
        if func in (F.batch_norm, torch.batch_norm) and _training(*args, **(kwargs or {})):
            raise ManifoldError(
                "the map runs a batch norm in training mode, which mixes the items of a batch; "
                "call eval() on the network"
            )
        return func(*args, **(kwargs or {}))


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    """The product x σ(x), never in place."""
    return input * torch.sigmoid(input)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """The layer norm with the arguments of `torch.layer_norm`."""
    last = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(last, keepdim=True)
    output = centred * torch.rsqrt((centred * centred).mean(last, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The instance norm with the arguments of `torch.nn.functional.instance_norm`; none are kept."""
    over = tuple(range(2, input.ndim))
    shape = (1, -1, *(1 for _ in over))
    if use_input_stats or running_mean is None or running_var is None:
        centred = input - input.mean(over, keepdim=True)
        output = centred * torch.rsqrt((centred * centred).mean(over, keepdim=True) + eps)
    else:
        output = (input - running_mean.view(shape)) * torch.rsqrt(running_var.view(shape) + eps)
    output = output if weight is None else output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


def _training(
    input: Tensor, first: Any = None, second: Any = None, third: Any = None, fourth: Any = None, *rest: Any,
    training: bool = False, **options: Any,
) -> bool:  # fmt: skip
    """Whether the arguments of a batch norm ask for the statistics of the batch."""
    return training or bool(rest and rest[0] is True)
