"""Backward of split batch norm where two gradients meet: those of a block's output, which two layers read.

    dx, g, dweight, dbias = backward(dy + second, …)

Autograd adds them up in a pass of its own, and the backward reads the sum twice. Here the reduction reads
both, adds, gates and writes g, and the input gradient reads g alone: 7 passes for 9 with a residual, whose
gradient g is, for 8 without. The bits are those of the sum, as it is rounded where an addition would.

Compiled passes call it where they find the addition (`arat_fast.training.joined_gradients`).
"""

import torch
from torch import Tensor

from .dispatch import check_channels_last, check_same, check_tensor
from .split_batch_norm_checks import check_backward
from .split_batch_norm_cpp import batch_backward_cpp, on_cpp
from .split_batch_norm_launch import batch_backward_triton
from .split_batch_norm_ops import no_tensor, on_triton

__all__ = ["joined_backward_reference"]


def joined_backward_reference(
    dy: Tensor,
    second: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin: an addition, then the backward of one gradient."""
    dx, g, dweight, dbias = torch.ops.arat_fast.split_bn_batch_backward(
        dy + second, x, gate, relu, mean, var, weight, bias, residual_gradient, eps
    )
    return dx, g, dweight, dbias


def _check_second(second: Tensor, dy: Tensor) -> None:
    check_tensor("second", second, (dy.dtype,), ndim=4)
    check_same("second", second, "dy", dy)
    check_channels_last("second", second)


@torch.library.custom_op("arat_fast::split_bn_joined_backward", mutates_args=())
def _joined_backward(
    dy: Tensor,
    second: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(dy, x, gate, relu, weight=weight, bias=bias, mean=mean, var=var)
    _check_second(second, dy)
    arguments = (x, gate, relu, mean, var, weight, bias, residual_gradient, eps)
    if on_triton(x):
        dx, g, dweight, dbias = batch_backward_triton(dy, *arguments, second=second)
    elif on_cpp(x) and (gate is None or gate.dtype == x.dtype):
        dx, g, dweight, dbias = batch_backward_cpp(dy, second, *arguments)
    else:
        return joined_backward_reference(dy, second, *arguments)
    return dx, no_tensor(dy) if g is None else g, dweight, dbias


@_joined_backward.register_fake
def _(
    dy: Tensor,
    second: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(dy, x, gate, relu, weight=weight, bias=bias, mean=mean, var=var)
    _check_second(second, dy)
    g = torch.empty_like(dy) if residual_gradient else no_tensor(dy)
    return torch.empty_like(dy), g, torch.empty_like(weight), torch.empty_like(weight)
