"""One step of L2 projected gradient ascent in at most two launches; `kernels.pgd` has the public functions.

    d = x_adv + alpha·g / ||g|| - x;   x_adv <- clamp(x + d·min(1, eps / ||d||), 0, 1),   norms per image

An image that fits a block (CIFAR: 3072 elements) is read once and stepped in one launch. A larger one is
read twice: the first launch sums <g, g>, <x_adv - x, g> and <x_adv - x, x_adv - x> by chunks, from which
the second knows both norms. Not finite: a gradient with a NaN or an infinity makes its whole image NaN, as
dividing by its norm does in PyTorch; a gradient of norm up to 1e-18, whose squares leave fp32's range,
counts as zero and moves nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import amount, amount_arguments, clamp_keeping_nan
from .compile_cases import CompileCase
from .dispatch import on_device, traceable

SMALLEST_NORM = 1e-18
_BLOCK = 4096


def l2_step_reference(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: float | Tensor, alpha: float | Tensor
) -> Tensor:
    """The step in plain PyTorch, in the dtype of x (fp32 or float64)."""
    grad = grad.to(x.dtype)
    axes = tuple(range(1, x.ndim))
    size = torch.linalg.vector_norm(grad, dim=axes, keepdim=True)
    delta = x_adv + torch.where(size <= SMALLEST_NORM, 0.0, alpha * size.reciprocal()) * grad - x
    radius = torch.linalg.vector_norm(delta, dim=axes, keepdim=True)
    return (x + delta * torch.where(radius <= eps, 1.0, eps * radius.reciprocal())).clamp(0, 1)


@triton.jit
def _pgd_l2_sums_kernel(x_adv, x, grad, sums, numel, chunks, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """<g, g>, <x_adv - x, g>, <x_adv - x, x_adv - x> of one chunk of an image, to sums[image, :, chunk]."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = image * numel + chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = None if EVEN else lane < numel - chunk * BLOCK
    other = None if EVEN else 0.0
    g = tl.load(grad + start + lane, mask=inside, other=other).to(tl.float32)
    delta = tl.load(x_adv + start + lane, mask=inside, other=other)
    delta -= tl.load(x + start + lane, mask=inside, other=other)
    place = sums + image * 3 * chunks + chunk
    tl.store(place, tl.sum(g * g, 0))
    tl.store(place + chunks, tl.sum(delta * g, 0))
    tl.store(place + 2 * chunks, tl.sum(delta * delta, 0))


@triton.jit
def _pgd_l2_kernel(
    x_adv,
    x,
    grad,
    out,
    low_precision,
    sums,
    eps_tensor,
    alpha_tensor,
    eps_value,
    alpha_value,
    numel,
    chunks,
    EPS_TENSOR: tl.constexpr,
    ALPHA_TENSOR: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    WHOLE_IMAGE: tl.constexpr,  # a block holds the image: the norms are taken here, `sums` is not read
    CHUNKS: tl.constexpr,
    SMALLEST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = image * numel + chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = None if EVEN else lane < numel - chunk * BLOCK
    other = None if EVEN else 0.0
    eps = amount(eps_tensor, eps_value, EPS_TENSOR)
    alpha = amount(alpha_tensor, alpha_value, ALPHA_TENSOR)
    g = tl.load(grad + start + lane, mask=inside, other=other).to(tl.float32)
    centre = tl.load(x + start + lane, mask=inside, other=other)
    delta = tl.load(x_adv + start + lane, mask=inside, other=other) - centre
    if WHOLE_IMAGE:
        size = tl.sqrt_rn(tl.sum(g * g, 0))
    else:
        entry = tl.arange(0, CHUNKS)
        place = sums + image * 3 * chunks + entry
        known = entry < chunks
        gg = tl.sum(tl.load(place, mask=known, other=0.0), 0)
        dg = tl.sum(tl.load(place + chunks, mask=known, other=0.0), 0)
        dd = tl.sum(tl.load(place + 2 * chunks, mask=known, other=0.0), 0)
        size = tl.sqrt_rn(gg)
    step = tl.where(size <= SMALLEST, 0.0, tl.div_rn(alpha, size))
    delta += step * g
    if WHOLE_IMAGE:
        radius = tl.sqrt_rn(tl.sum(delta * delta, 0))
    else:
        # Expanding the square costs no accuracy where the answer matters: outside the ball, with the start
        # in it, ||d|| is at least the larger of eps and alpha - eps, so the terms are at most 9 times their
        # sum.
        squared = dd + 2.0 * step * dg + step * step * gg
        radius = tl.sqrt_rn(clamp_keeping_nan(squared, 0.0, float("inf")))
    moved = centre + delta * tl.where(radius <= eps, 1.0, tl.div_rn(eps, radius))
    moved = clamp_keeping_nan(moved, 0.0, 1.0)
    tl.store(out + start + lane, moved, mask=inside)
    if LOW_PRECISION:
        tl.store(low_precision + start + lane, moved.to(low_precision.dtype.element_ty), mask=inside)


def launch_l2(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    out: Tensor,
    low_precision: Tensor | None,
    eps: float | Tensor,
    alpha: float | Tensor,
) -> None:
    """Write the step to `out` (which may be x_adv) and, where given, its half-precision copy."""
    eps_tensor, eps_value, eps_from_tensor = amount_arguments(eps, x)
    alpha_tensor, alpha_value, alpha_from_tensor = amount_arguments(alpha, x)
    count, numel = x.shape[0], x.numel() // x.shape[0]
    block = min(_BLOCK, triton.next_power_of_2(numel))
    chunks = triton.cdiv(numel, block)
    even = numel % block == 0
    sums = x
    if chunks > 1:
        sums = torch.empty((count, 3, chunks), dtype=torch.float32, device=x.device)
        with on_device(x):
            traceable(_pgd_l2_sums_kernel)[(count, chunks)](
                x_adv, x, grad, sums, numel, chunks, EVEN=even, BLOCK=block, num_warps=8
            )
    with on_device(x):
        traceable(_pgd_l2_kernel)[(count, chunks)](
            x_adv,
            x,
            grad,
            out,
            out if low_precision is None else low_precision,
            sums,
            eps_tensor,
            alpha_tensor,
            eps_value,
            alpha_value,
            numel,
            chunks,
            EPS_TENSOR=eps_from_tensor,
            ALPHA_TENSOR=alpha_from_tensor,
            LOW_PRECISION=low_precision is not None,
            WHOLE_IMAGE=chunks == 1,
            CHUNKS=triton.next_power_of_2(chunks),
            SMALLEST=SMALLEST_NORM,
            EVEN=even,
            BLOCK=block,
            num_warps=8,
        )


def compile_cases() -> Iterator[CompileCase]:
    """Both kernels by gradient and copy dtype, for images of one chunk (CIFAR) and of several (64 pixels)."""
    scalar, one = torch.zeros(()), 0.25
    for half in (torch.float32, torch.bfloat16, torch.float16):
        low = half != torch.float32
        for pixels, tensors in ((32 * 32, True), (64 * 64, False)):
            x = torch.zeros(1, 3 * pixels)
            grad, copy = x.to(half), x.to(half)
            numel = x.numel()
            block = min(_BLOCK, triton.next_power_of_2(numel))
            chunks = triton.cdiv(numel, block)
            even = numel % block == 0
            dtype = str(half).removeprefix("torch.")
            if chunks > 1:
                yield CompileCase(
                    _pgd_l2_sums_kernel,
                    f"{dtype} gradient, {numel} elements an image",
                    (x, x, grad, x, numel, chunks),
                    {"EVEN": even, "BLOCK": block, "num_warps": 8},
                    bfloat16=half == torch.bfloat16,
                )
            yield CompileCase(
                _pgd_l2_kernel,
                f"{dtype} gradient{' and copy' if low else ''}, {numel} elements an image",
                (x, x, grad, x, copy, x, scalar, scalar, one, one, numel, chunks),
                {
                    "EPS_TENSOR": tensors,
                    "ALPHA_TENSOR": tensors,
                    "LOW_PRECISION": low,
                    "WHOLE_IMAGE": chunks == 1,
                    "CHUNKS": triton.next_power_of_2(chunks),
                    "SMALLEST": SMALLEST_NORM,
                    "EVEN": even,
                    "BLOCK": block,
                    "num_warps": 8,
                },
                bfloat16=half == torch.bfloat16,
            )
