"""The composable ops of split batch normalisation: implementation by device, fake and autograd formulas.

Each is functional. Backward ops take a gate, which tells where the ReLU let through: packed bits (uint8), the
output y itself (off Triton), or None: found again from x. Triton, PyTorch's CPU kernels or the reference run.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import use_triton
from .split_batch_norm_checks import (
    check_activation,
    check_apply,
    check_backward,
    check_input_gradient,
    check_rows,
)
from .split_batch_norm_cpu import (
    apply_cpu,
    batch_backward_cpu,
    input_gradient_cpu,
)
from .split_batch_norm_launch import (
    apply_triton,
    input_gradient_triton,
    reduce_triton,
    statistics_triton,
)
from .split_batch_norm_reference import (
    apply_reference,
    as_branches,
    input_gradient_reference,
    reduce_reference,
    statistics_reference,
    through_relu_reference,
)


def on_triton(x: Tensor) -> bool:
    """Whether the kernels run on this tensor."""
    return use_triton(x) and x.dtype != torch.float64


def no_tensor(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an op returns in place of None."""
    return like.new_empty(0, dtype=dtype)


def bits_like(x: Tensor) -> Tensor:
    """Room for a bit an element, packed by channel."""
    n, c, h, w = x.shape
    return x.new_empty((n * h * w, (c + 7) // 8), dtype=torch.uint8)


# ---- statistics ----


@torch.library.custom_op("arat_fast::split_bn_statistics", mutates_args=())
def _statistics(x: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    check_activation("x", x)
    check_rows(x, branches)
    return statistics_triton(x, branches) if on_triton(x) else statistics_reference(x, branches)


@_statistics.register_fake
def _(x: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    check_activation("x", x)
    check_rows(x, branches)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((branches, x.shape[1]), dtype=dtype)
    return mean, torch.empty_like(mean)


# ---- apply: statistics are constants; differentiable twice in everything else ----


@torch.library.custom_op("arat_fast::split_bn_apply", mutates_args=())
def _apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_apply(x, mean, var, weight, bias, residual)
    if on_triton(x):
        y, bits = apply_triton(x, mean, var, weight, bias, residual, relu, relu, eps)
        return y, no_tensor(x, torch.uint8) if bits is None else bits
    if x.device.type == "cpu":
        y = apply_cpu(x, mean, var, weight, bias, residual, relu, eps)
    else:
        y = apply_reference(x, mean, var, weight, bias, residual, relu, eps)[0]
    return y, no_tensor(x, torch.uint8)


@_apply.register_fake
def _(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_apply(x, mean, var, weight, bias, residual)
    return torch.empty_like(x), bits_like(x) if relu and on_triton(x) else no_tensor(x, torch.uint8)


def saved_gate(y: Tensor, bits: Tensor, relu: bool) -> Tensor | None:
    """What backward reads to know where ReLU let through."""
    if not relu:
        return None
    return bits if on_triton(y) else y


def channels_last_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels want it. Autograd chose its layout: a mean over pixels hands back an expanded tensor."""
    return dy.to(dtype).contiguous(memory_format=torch.channels_last)


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mean, var, weight, bias, _, ctx.relu, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    parameter_gradients = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    ctx.save_for_backward(
        x if parameter_gradients else None, saved_gate(*output, ctx.relu), mean, var, weight, bias
    )
    ctx.mark_non_differentiable(output[1])


def _apply_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, gate, mean, var, weight, bias = ctx.saved_tensors
    dy = channels_last_gradient(dy, ctx.dtype)
    need_x, _, _, need_weight, need_bias, need_residual, _, _ = ctx.needs_input_grad
    dx = dweight = dbias = None
    dresidual = dy if need_residual else None
    if need_weight or need_bias:
        dbias, dweight = torch.ops.arat_fast.split_bn_reduce(
            dy, x, gate, ctx.relu, mean, var, weight, bias, ctx.eps
        )
    if need_x or (need_residual and ctx.relu):
        through = need_residual and ctx.relu
        dx, g = torch.ops.arat_fast.split_bn_input_gradient(
            dy, None, gate, ctx.relu, mean, var, weight, bias, None, None, 0.0, through, ctx.eps
        )
        dresidual = g if through else dresidual
    return dx, None, None, dweight, dbias, dresidual, None, None


_apply.register_autograd(_apply_backward, setup_context=_apply_setup)


# ---- reduce ----


@torch.library.custom_op("arat_fast::split_bn_reduce", mutates_args=())
def _reduce(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_backward(dy, x, gate, relu, weight=weight, bias=bias, mean=mean, var=var)
    if on_triton(x):
        return reduce_triton(dy, x, gate, relu, mean, var, weight, bias, eps)
    if x.device.type == "cpu" and (not relu or (gate is not None and gate.dtype == x.dtype)):
        _, _, dweight, dbias = batch_backward_cpu(dy, gate if relu else None, x, mean, var, weight, eps)
        return dbias, dweight
    return reduce_reference(dy, x, gate, relu, mean, var, weight, bias, eps)


@_reduce.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_backward(dy, x, gate, relu, weight=weight, bias=bias, mean=mean, var=var)
    return torch.empty_like(weight), torch.empty_like(weight)


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, gate, ctx.relu, mean, var, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, x, gate, mean, var, weight, bias)


def _reduce_backward(
    ctx: Any, d_sum_g: Tensor | None, d_sum_gxhat: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradient of (Σ g, Σ g·x̂), statistics constant, in plain differentiable operations."""
    dy, x, gate, mean, var, weight, bias = ctx.saved_tensors
    with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
        zero = torch.zeros_like(weight)
        a = zero if d_sum_g is None else d_sum_g
        b = (zero if d_sum_gxhat is None else d_sum_gxhat) * torch.rsqrt(var + ctx.eps)
        n, c, h, w = x.shape
        rows = as_branches(x, weight.shape[0])
        slope = (a[:, None] + b[:, None] * (rows.to(weight.dtype) - mean[:, None])).to(x.dtype)
        towards = slope.view(n, h, w, c).permute(0, 3, 1, 2)
        arguments = (gate, ctx.relu, mean, var, weight, bias, ctx.eps)
        g = through_relu_reference(dy, x, *arguments)
        d_dy = through_relu_reference(towards, x, *arguments).to(x.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
        d_x = (g * b[:, None]).to(x.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
    return d_dy, d_x, *(None,) * 7


_reduce.register_autograd(_reduce_backward, setup_context=_reduce_setup)


# ---- input gradient ----


@torch.library.custom_op("arat_fast::split_bn_input_gradient", mutates_args=())
def _input_gradient(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor | None,
    sum_gxhat: Tensor | None,
    per_count: float,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_input_gradient(dy, x, gate, relu, mean, var, weight, bias, sum_g, sum_gxhat)
    if on_triton(dy):
        dx, g = input_gradient_triton(
            dy, x, gate, relu, mean, var, weight, bias, sum_g, sum_gxhat, per_count, residual_gradient, eps
        )
    elif (
        sum_g is None
        and dy.device.type == "cpu"
        and (not relu or (gate is not None and gate.dtype == dy.dtype))
    ):
        dx, g = input_gradient_cpu(dy, gate if relu else None, var, weight, eps)
        g = g if relu else g.clone()  # an op must not hand back its input
    else:
        mean_g = None if sum_g is None else sum_g * per_count
        mean_gxhat = None if sum_gxhat is None else sum_gxhat * per_count
        dx, g = input_gradient_reference(dy, x, gate, relu, mean, var, weight, bias, mean_g, mean_gxhat, eps)
        g = g if relu else g.clone()
    return dx, g if residual_gradient and g is not None else no_tensor(dy)


@_input_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor | None,
    sum_gxhat: Tensor | None,
    per_count: float,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_input_gradient(dy, x, gate, relu, mean, var, weight, bias, sum_g, sum_gxhat)
    return torch.empty_like(dy), torch.empty_like(dy) if residual_gradient else no_tensor(dy)


def _input_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, gate, ctx.relu, mean, var, weight, bias, sum_g, _, _, _, ctx.eps = inputs
    ctx.batch = sum_g is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy if ctx.needs_input_grad[6] else None, x, gate, mean, var, weight, bias)


def _input_gradient_backward(
    ctx: Any, d_dx: Tensor | None, d_dresidual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """With constant statistics the op is linear in dy, and its own transpose."""
    if ctx.batch:
        raise RuntimeError("batch_norm_input_gradient with sums has no derivative; use split_batch_norm")
    dy, x, gate, mean, var, weight, bias = ctx.saved_tensors
    d_dy = d_weight = None
    if d_dx is not None:
        d_dx = channels_last_gradient(
            d_dx, gate.dtype if gate is not None and gate.is_floating_point() else d_dx.dtype
        )
        d_dy, _ = torch.ops.arat_fast.split_bn_input_gradient(
            d_dx, x, gate, ctx.relu, mean, var, weight, bias, None, None, 0.0, False, ctx.eps
        )
        if ctx.needs_input_grad[6]:
            g = through_relu_reference(dy, x, gate, ctx.relu, mean, var, weight, bias, ctx.eps)
            towards = as_branches(d_dx, weight.shape[0]).to(g.dtype)
            d_weight = (g * towards).sum(1) * torch.rsqrt(var + ctx.eps)
    if d_dresidual is not None and d_dresidual.numel():
        n, c, h, w = d_dresidual.shape
        d_dresidual = channels_last_gradient(d_dresidual, d_dresidual.dtype)
        g = through_relu_reference(d_dresidual, x, gate, ctx.relu, mean, var, weight, bias, ctx.eps)
        through = g.to(d_dresidual.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
        d_dy = through if d_dy is None else d_dy + through
    return d_dy, None, None, None, None, None, d_weight, *(None,) * 6


_input_gradient.register_autograd(_input_gradient_backward, setup_context=_input_gradient_setup)
