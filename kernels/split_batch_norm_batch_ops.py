"""The fused ops of split batch normalisation with the batch's statistics, forward and backward.

As in `split_batch_norm_ops`, whose gates these are, Triton, C++, PyTorch's CPU kernels or the reference run.
"""

from typing import Any

import torch
from torch import Tensor

from .split_batch_norm_checks import check_backward, check_batch
from .split_batch_norm_cpp import batch_backward_cpp, batch_forward_cpp, on_cpp
from .split_batch_norm_cpu import apply_cpu, batch_backward_cpu, batch_forward_cpu
from .split_batch_norm_launch import batch_backward_triton, batch_forward_triton
from .split_batch_norm_ops import bits_like, channels_last_gradient, no_tensor, on_triton, saved_gate
from .split_batch_norm_reference import (
    backward_reference,
    input_gradient_reference,
    reduce_reference,
    split_batch_norm_reference,
)


@torch.library.custom_op("arat_fast::split_bn_batch", mutates_args=())
def _batch(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_batch(x, weight, bias, residual)
    bits = None
    if on_triton(x):
        save_bits = relu and residual is not None
        y, bits, mean, var = batch_forward_triton(x, weight, bias, residual, relu, save_bits, eps)
    elif on_cpp(x):
        y, mean, var = batch_forward_cpp(x, weight, bias, residual, relu, eps)
    elif x.device.type == "cpu":
        y, mean, var = batch_forward_cpu(x, weight, bias, residual, relu, eps)
    else:
        y, mean, var = split_batch_norm_reference(x, weight, bias, residual=residual, relu=relu, eps=eps)
    return y, no_tensor(x, torch.uint8) if bits is None else bits, mean, var


@_batch.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_batch(x, weight, bias, residual)
    save_bits = on_triton(x) and relu and residual is not None
    bits = bits_like(x) if save_bits else no_tensor(x, torch.uint8)
    return torch.empty_like(x), bits, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("arat_fast::split_bn_batch_backward", mutates_args=())
def _batch_backward(
    dy: Tensor,
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
    g: Tensor | None
    if on_triton(x):
        dx, g, dweight, dbias = batch_backward_triton(
            dy, x, gate, relu, mean, var, weight, bias, residual_gradient, eps
        )
    elif on_cpp(x) and (gate is None or gate.dtype == x.dtype):
        dx, g, dweight, dbias = batch_backward_cpp(
            dy, None, x, gate, relu, mean, var, weight, bias, residual_gradient, eps
        )
    elif x.device.type == "cpu" and (gate is None or gate.dtype == x.dtype):
        if relu and gate is None:  # a cached graph of a process that had the C++ kernels
            gate = apply_cpu(x, mean, var, weight, bias, None, relu, eps)
        dx, g, dweight, dbias = batch_backward_cpu(dy, gate if relu else None, x, mean, var, weight, eps)
        g = g if relu else g.clone()
    else:
        dbias, dweight = reduce_reference(dy, x, gate, relu, mean, var, weight, bias, eps)
        count = x.numel() // weight.numel()
        dx, g = input_gradient_reference(
            dy, x, gate, relu, mean, var, weight, bias, dbias / count, dweight / count, eps
        )
        g = g if relu else g.clone()
    return dx, g if residual_gradient and g is not None else no_tensor(dy), dweight, dbias


@_batch_backward.register_fake
def _(
    dy: Tensor,
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
    dresidual = torch.empty_like(dy) if residual_gradient else no_tensor(dy)
    return torch.empty_like(dy), dresidual, torch.empty_like(weight), torch.empty_like(weight)


def _batch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.relu, ctx.eps = inputs
    y, bits, mean, var = output
    ctx.set_materialize_grads(False)
    gate = saved_gate(y, bits, ctx.relu)
    if residual is None and (on_triton(x) or on_cpp(x)):
        gate = None
    ctx.save_for_backward(x, gate, mean, var, weight, bias)
    ctx.mark_non_differentiable(bits, mean, var)


def _batch_grad(
    ctx: Any, dy: Tensor | None, _bits: Tensor | None, _mean: Tensor | None, _var: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, gate, mean, var, weight, bias = ctx.saved_tensors
    dy = channels_last_gradient(dy, x.dtype)
    need_residual = ctx.needs_input_grad[3]
    if torch.is_grad_enabled():  # create_graph=True: a formula that can be differentiated again
        dx, g, dweight, dbias = backward_reference(dy, x, gate, ctx.relu, weight, bias, ctx.eps)
    else:
        through = need_residual and ctx.relu
        dx, g, dweight, dbias = torch.ops.arat_fast.split_bn_batch_backward(
            dy, x, gate, ctx.relu, mean, var, weight, bias, through, ctx.eps
        )
        g = g if through else dy
    return dx, dweight, dbias, g if need_residual else None, None, None


_batch.register_autograd(_batch_grad, setup_context=_batch_setup)
