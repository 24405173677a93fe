"""Launchers of the split-BN kernels: one to three launches for each op."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import split_batch_norm_triton as forward
from . import split_batch_norm_triton_backward as backward
from .dispatch import on_device
from .split_batch_norm_plan import cdiv, combination, elementwise, reduction, small

__all__ = [
    "Launch",
    "apply_triton",
    "batch_backward_triton",
    "batch_forward_triton",
    "gate_kind",
    "input_gradient_triton",
    "record",
    "reduce_triton",
    "statistics_triton",
]

# Bytes of a channel up to which one program holds a column of the layer, 8 channels, in its registers: 4 × 4
# layers at batch 128 a branch have 2,048 rows. In fp32 so many would spill.
SMALL_BYTES = 4096


class Launch(NamedTuple):
    """A kernel with what it is launched with."""

    kernel: Any
    args: tuple[object, ...]
    meta: dict[str, object]


# While set, launches are written down instead of done: the compile-only check sees exactly what a trainer
# launches.
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def record(function: Callable[..., object], *args: object, **options: object) -> list[Launch]:
    """The launches that a launcher would do with these arguments, none of them done."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        function(*args, **options)
    finally:
        _recorded.reset(token)
    return launches


def _launch(kernel: Any, grid: tuple[int, ...], *args: object, **meta: object) -> None:
    recorded = _recorded.get()
    if recorded is None:
        kernel[grid](*args, **meta)
    else:
        recorded.append(Launch(kernel, args, meta))


def _shape(x: Tensor, branches: int) -> tuple[int, int]:
    """(rows a branch, channels)."""
    return x.numel() // (branches * x.shape[1]), x.shape[1]


def _new_bits(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty(n * h * w, cdiv(c, 8), dtype=torch.uint8, device=x.device)


def gate_kind(gate: Tensor | None, relu: bool) -> int:
    """Which GATE the backward kernels are compiled for."""
    kind = backward.GATE_NONE if not relu else backward.GATE_RECOMPUTE if gate is None else backward.GATE_BITS
    return int(kind.value)


def statistics_triton(x: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each (branches, C) fp32, in two launches."""
    rows, c = _shape(x, branches)
    plan = reduction(rows, c, branches, x.element_size(), streams=1)
    partial = torch.empty(branches, plan.splits, 2, c, dtype=torch.float32, device=x.device)
    mean = torch.empty(branches, c, dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    block_s, block_c = combination(plan.splits)
    with on_device(x):
        _launch(
            forward.statistics_partial_kernel,
            (plan.splits, cdiv(c, plan.block_c), branches),
            x,
            partial,
            rows,
            c,
            plan.steps,
            BLOCK_R=plan.block_r,
            BLOCK_C=plan.block_c,
            num_warps=4,
        )
        _launch(
            forward.statistics_combine_kernel,
            (cdiv(c, block_c), branches),
            partial,
            mean,
            var,
            rows,
            c,
            plan.rows,
            plan.splits,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return mean, var


def apply_triton(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    save_bits: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """(y, packed bits or None) in one launch."""
    branches = weight.shape[0]
    rows, c = _shape(x, branches)
    y = torch.empty_like(x)
    bits = _new_bits(x) if save_bits else None
    block_r, block_c = elementwise(c, x.element_size())
    with on_device(x):
        _launch(
            forward.apply_kernel,
            (cdiv(rows, block_r), cdiv(c, block_c), branches),
            x,
            x if residual is None else residual,
            mean,
            var,
            weight,
            bias,
            y,
            x if bits is None else bits,
            rows,
            c,
            eps,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            SAVE_BITS=save_bits,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return y, bits


def reduce_triton(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    second: Tensor | None = None,
    joined: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g·x̂, each (branches, C) fp32, in two launches; with `second` and `joined`, both like dy, g
    is of dy + second and written to `joined`.
    """
    branches = weight.shape[0]
    rows, c = _shape(x, branches)
    plan = reduction(rows, c, branches, x.element_size(), streams=2 if second is None else 3)
    partial = torch.empty(branches, plan.splits, 2, c, dtype=torch.float32, device=x.device)
    sum_g, sum_gxhat = torch.empty_like(weight), torch.empty_like(weight)
    block_s, block_c = combination(plan.splits)
    with on_device(x):
        _launch(
            backward.reduce_partial_kernel,
            (plan.splits, cdiv(c, plan.block_c), branches),
            dy,
            dy if second is None else second,
            dy if joined is None else joined,
            x,
            dy if gate is None else gate,
            mean,
            var,
            weight,
            bias,
            partial,
            rows,
            c,
            eps,
            plan.steps,
            UNROLL=plan.unroll,
            GATE=gate_kind(gate, relu),
            JOIN=second is not None,
            BLOCK_R=plan.block_r,
            BLOCK_C=plan.block_c,
            num_warps=4,
        )
        _launch(
            backward.reduce_combine_kernel,
            (cdiv(c, block_c), branches),
            partial,
            var,
            sum_g,
            sum_gxhat,
            c,
            plan.splits,
            eps,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return sum_g, sum_gxhat


def input_gradient_triton(
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
) -> tuple[Tensor, Tensor | None]:
    """(dx, gradient of the residual or None) in one launch; x is read only where it is needed."""
    branches = weight.shape[0]
    rows, c = _shape(dy, branches)
    dx = torch.empty_like(dy)
    dresidual = torch.empty_like(dy) if residual_gradient else None
    block_r, block_c = elementwise(c, dy.element_size())
    with on_device(dy):
        _launch(
            backward.input_gradient_kernel,
            (cdiv(rows, block_r), cdiv(c, block_c), branches),
            dy,
            dy if x is None else x,
            dy if gate is None else gate,
            mean,
            var,
            weight,
            bias,
            var if sum_g is None else sum_g,
            var if sum_gxhat is None else sum_gxhat,
            dx,
            dx if dresidual is None else dresidual,
            rows,
            c,
            per_count,
            eps,
            BATCH=sum_g is not None,
            GATE=gate_kind(gate, relu),
            RESIDUAL=residual_gradient,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return dx, dresidual


def batch_forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    save_bits: bool,
    eps: float,
    one_launch: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, bits or None, mean, var): one launch for few rows (or as `one_launch` says), else three."""
    branches = weight.shape[0]
    rows, c = _shape(x, branches)
    if not (rows * x.element_size() <= SMALL_BYTES if one_launch is None else one_launch):
        mean, var = statistics_triton(x, branches)
        y, bits = apply_triton(x, mean, var, weight, bias, residual, relu, save_bits, eps)
        return y, bits, mean, var
    y, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    bits = _new_bits(x) if save_bits else None
    block_r, block_c, num_warps = small(rows)
    with on_device(x):
        _launch(
            forward.small_forward_kernel,
            (cdiv(c, block_c), branches),
            x,
            x if residual is None else residual,
            weight,
            bias,
            y,
            x if bits is None else bits,
            mean,
            var,
            rows,
            c,
            eps,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            SAVE_BITS=save_bits,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return y, bits, mean, var


def batch_backward_triton(
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
    one_launch: bool | None = None,
    second: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dresidual or None, dweight, dbias): one launch for few rows or by `one_launch`, else three.

    With `second` the gradient is dy + second, added up on the way.
    """
    branches = weight.shape[0]
    rows, c = _shape(x, branches)
    if not (rows * x.element_size() <= SMALL_BYTES if one_launch is None else one_launch):
        if second is not None:
            # Read once, gated and written as the sum; the next launch reads that and needs no gate.
            g = torch.empty_like(dy)
            dbias, dweight = reduce_triton(dy, x, gate, relu, mean, var, weight, bias, eps, second, g)
            dx, _ = input_gradient_triton(
                g, x, None, False, mean, var, weight, bias, dbias, dweight, 1 / rows, False, eps
            )
            return dx, g if residual_gradient else None, dweight, dbias
        dbias, dweight = reduce_triton(dy, x, gate, relu, mean, var, weight, bias, eps)
        dx, dresidual = input_gradient_triton(
            dy, x, gate, relu, mean, var, weight, bias, dbias, dweight, 1 / rows, residual_gradient, eps
        )
        return dx, dresidual, dweight, dbias
    dx, dweight, dbias = torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)
    dresidual = torch.empty_like(dy) if residual_gradient else None
    block_r, block_c, num_warps = small(rows)
    with on_device(x):
        _launch(
            backward.small_backward_kernel,
            (cdiv(c, block_c), branches),
            dy,
            dy if second is None else second,
            x,
            dy if gate is None else gate,
            mean,
            var,
            weight,
            bias,
            dx,
            dx if dresidual is None else dresidual,
            dweight,
            dbias,
            rows,
            c,
            eps,
            GATE=gate_kind(gate, relu),
            JOIN=second is not None,
            RESIDUAL=residual_gradient,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return dx, dresidual, dweight, dbias
