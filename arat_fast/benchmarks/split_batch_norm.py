"""Benchmark cases of split BN + residual + ReLU: ResNet-18 layers on [clean; adv], forward and backward.

Variants: ours; eager (a BatchNorm a branch, cat, add, ReLU); inductor (the same, compiled); view (the (B, R,
C) view of the channels-last storage in plain PyTorch, compiled: the fair baseline); where a layer has few
rows, ours in one and in three launches. With batch statistics x has to be read twice: the first pass must end
before the second begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_fast.kernels import split_batch_norm_batch_ops  # noqa: F401  registers the ops
from arat_fast.kernels.dispatch import use_triton
from arat_fast.kernels.split_batch_norm_launch import (
    SMALL_BYTES,
    batch_backward_triton,
    batch_forward_triton,
)
from arat_fast.kernels.split_batch_norm_reference import (
    input_gradient_reference,
    reduce_reference,
    split_batch_norm_reference,
)

from .cases import BenchmarkCase, Variant

EPS = 1e-5
# Rounding of y, of the residual sum, and of each gradient, at magnitudes up to 8.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.13}


def _layer(
    images: int, channels: int, side: int, branches: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """Maker of (x, residual, weight, bias)."""

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (images * branches, side, side, channels)
        x, residual = (
            torch.randn(shape, device=device, generator=generator).to(dtype).permute(0, 3, 1, 2)
            for _ in range(2)
        )
        weight = torch.rand((branches, channels), device=device, generator=generator) + 0.5
        bias = torch.randn((branches, channels), device=device, generator=generator)
        return x, residual, weight, bias

    return make


def _eager_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    parts = [
        F.batch_norm(part, None, None, weight[k], bias[k], True, 0.1, EPS)
        for k, part in enumerate(x.chunk(weight.shape[0]))
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (y if residual is None else y + residual).relu()


def _eager_backward(
    dy: Tensor, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    g = torch.ops.aten.threshold_backward(dy, y, 0)
    rstd = torch.rsqrt(var + EPS)
    branches = weight.shape[0]
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            g_k, x_k, weight[k], None, None, mean[k], rstd[k], True, EPS, [True, True, True]
        )[0]
        for k, (g_k, x_k) in enumerate(zip(g.chunk(branches), x.chunk(branches), strict=True))
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0], g


def _view_backward(
    dy: Tensor, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    dbias, dweight = reduce_reference(dy, x, y, True, mean, var, weight, weight, EPS)
    per_count = weight.numel() / x.numel()
    return input_gradient_reference(
        dy, x, y, True, mean, var, weight, weight, dbias * per_count, dweight * per_count, EPS
    )


def _named(
    kernel: str, images: int, channels: int, side: int, branches: int, dtype: torch.dtype, residual: bool
) -> tuple[str, str]:
    which = ", residual" if residual else ""
    shape = f"{branches} x {images}x{channels}x{side}x{side} {str(dtype).removeprefix('torch.')}"
    return f"split_bn {kernel}{which}", shape


def _forward(
    images: int,
    channels: int,
    side: int,
    branches: int,
    dtype: torch.dtype,
    residual: bool,
    device: torch.device,
) -> BenchmarkCase:
    def eager(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _eager_forward(x, r if residual else None, weight, bias)

    def view(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return split_batch_norm_reference(
            x, weight, bias, residual=r if residual else None, relu=True, eps=EPS
        )[0]

    def ours(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.ops.arat_fast.split_bn_batch(x, weight, bias, r if residual else None, True, EPS)[0]
        return y

    def launches(one: bool) -> Variant:
        return lambda x, r, weight, bias: batch_forward_triton(
            x, weight, bias, r if residual else None, True, residual, EPS, one_launch=one
        )[0]

    variants: dict[str, Variant] = {"ours": ours, "eager": eager, **_compiled(eager, view)}
    if images * side * side * dtype.itemsize <= SMALL_BYTES and use_triton(torch.empty(0, device=device)):
        variants |= {"ours, one launch": launches(True), "ours, three launches": launches(False)}
    elements = images * branches * channels * side * side
    read = elements * dtype.itemsize * (4 if residual else 3)
    return BenchmarkCase(
        *_named("forward", images, channels, side, branches, dtype, residual),
        read + (elements // 8 if residual else 0),
        _layer(images, channels, side, branches, dtype, device),
        variants,
        TOLERANCE[dtype],
    )


def _compiled(eager: Variant, view: Variant) -> Mapping[str, Variant]:
    return {
        "inductor": torch.compile(eager, fullgraph=True, dynamic=False),
        "view": torch.compile(view, fullgraph=True, dynamic=False),
    }


def _backward(
    images: int,
    channels: int,
    side: int,
    branches: int,
    dtype: torch.dtype,
    residual: bool,
    device: torch.device,
) -> BenchmarkCase:
    layer = _layer(images, channels, side, branches, dtype, device)
    on_triton = use_triton(torch.empty(0, device=device))

    def make(seed: int) -> tuple[Tensor, ...]:
        x, r, weight, bias = layer(seed)
        y, bits, mean, var = torch.ops.arat_fast.split_bn_batch(
            x, weight, bias, r if residual else None, True, EPS
        )
        return r, x, y, bits, mean, var, weight, bias  # the residual serves as dy

    def reads_y(function: Any) -> Variant:
        def variant(
            dy: Tensor,
            x: Tensor,
            y: Tensor,
            bits: Tensor,
            mean: Tensor,
            var: Tensor,
            weight: Tensor,
            bias: Tensor,
        ) -> Any:
            dx, g = function(dy, x, y, mean, var, weight)
            return (dx, g) if residual else dx

        return variant

    def ours(
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        bits: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Any:
        gate = y if not on_triton else bits if residual else None
        dx, g, _, _ = torch.ops.arat_fast.split_bn_batch_backward(
            dy, x, gate, True, mean, var, weight, bias, residual, EPS
        )
        return (dx, g) if residual else dx

    def launches(one: bool) -> Variant:
        def variant(
            dy: Tensor,
            x: Tensor,
            y: Tensor,
            bits: Tensor,
            mean: Tensor,
            var: Tensor,
            weight: Tensor,
            bias: Tensor,
        ) -> Any:
            gate = bits if residual else None
            dx, g, _, _ = batch_backward_triton(
                dy, x, gate, True, mean, var, weight, bias, residual, EPS, one_launch=one
            )
            return (dx, g) if residual else dx

        return variant

    eager = reads_y(_eager_backward)
    variants: dict[str, Variant] = {
        "ours": ours,
        "eager": eager,
        **_compiled(eager, reads_y(_view_backward)),
    }
    if images * side * side * dtype.itemsize <= SMALL_BYTES and on_triton:
        variants |= {"ours, one launch": launches(True), "ours, three launches": launches(False)}
    elements = images * branches * channels * side * side
    moved = elements * dtype.itemsize * (6 if residual else 5)
    return BenchmarkCase(
        *_named("backward", images, channels, side, branches, dtype, residual),
        moved + (elements // 4 if residual else 0),
        make,
        variants,
        TOLERANCE[dtype],
    )


def _joined(
    images: int, channels: int, side: int, branches: int, dtype: torch.dtype, device: torch.device
) -> BenchmarkCase:
    """Backward with a residual where two gradients meet; "sum first": ours after an addition."""
    alone = _backward(images, channels, side, branches, dtype, True, device)
    layer = _layer(images, channels, side, branches, dtype, device)
    on_triton = use_triton(torch.empty(0, device=device))

    def make(seed: int) -> tuple[Tensor, ...]:
        return *alone.make(seed), layer(seed + 1000)[0]

    def of_sum(variant: Variant) -> Variant:
        return lambda dy, *inputs: variant(dy + inputs[-1], *inputs[:-1])

    def ours(dy: Tensor, x: Tensor, y: Tensor, bits: Tensor, *rest: Tensor) -> Any:
        *statistics, second = rest
        gate = bits if on_triton else y
        dx, g, _, _ = torch.ops.arat_fast.split_bn_joined_backward(
            dy, second, x, gate, True, *statistics, True, EPS
        )
        return dx, g

    eager = of_sum(alone.variants["eager"])
    variants: dict[str, Variant] = {
        "ours": ours,
        "eager": eager,
        "inductor": torch.compile(eager, fullgraph=True, dynamic=False),
        "sum first": of_sum(alone.variants["ours"]),
    }
    elements = images * branches * channels * side * side
    name, shape = _named("backward of two gradients", images, channels, side, branches, dtype, True)
    moved = 7 * elements * dtype.itemsize + elements // 8
    return BenchmarkCase(name, shape, moved, make, variants, 2 * TOLERANCE[dtype])


def benchmark_cases(device: torch.device, small: bool = False) -> Iterator[BenchmarkCase]:
    """Every layer at batch 128 a branch, the first and the last at 512; both branches, and one. On a CPU the
    first and the last, at batch 16.
    """
    half = torch.bfloat16
    if small:
        layers = [(3, 16, 5, 2, half, True), (3, 16, 5, 1, torch.float32, False)]
    elif device.type == "cpu":
        layers = [(16, c, side, 2, torch.float32, True) for c, side in ((64, 32), (512, 4))]
        layers.append((16, 64, 32, 1, torch.float32, False))
    else:
        layers = [(128, c, side, 2, half, True) for c, side in ((64, 32), (128, 16), (256, 8), (512, 4))]
        layers += [(512, c, side, 2, half, True) for c, side in ((64, 32), (512, 4))]
        layers += [(batch, 64, 32, 2, half, False) for batch in (128, 512)]
        layers += [(512, 64, 32, 1, half, True), (128, 64, 32, 2, torch.float32, True)]
    for layer in layers:
        yield _forward(*layer, device)
        yield _backward(*layer, device)
        if layer[-1]:  # with a residual, and of both branches or one
            yield _joined(*layer[:-1], device)
