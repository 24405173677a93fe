"""Where an attack starts: noise round each image from counter-based Philox, in one launch.

    uniform   x + u,           u uniform in [-eps, eps] for each pixel
    l2        x + r·v / ||v||, v normal, r uniform in [0, eps], per image
    normal    x + 0.001·v,     v normal for each pixel (TRADES: a zero start has zero gradient)

and then clamped to [0, 1], unless the authors' unclamped start is asked for. 4 bytes are read and 4 written
per element, and 2 more with a half-precision copy.

The element of logical index i, in (N, C, H, W) order whatever the strides, draws the Philox words of
counter (i, offset) under key `seed`: the same numbers in channels-last and contiguous tensors, for any
block size, on CPU, GPU and interpreter. Offsets, 64 bits of the counter of their own, never overlap: use
the iteration's number.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .arithmetic import amount, amount_arguments, clamp_keeping_nan
from .compile_cases import CompileCase
from .dispatch import (
    HALF_DTYPES,
    INTERPRETING,
    check_amount,
    check_same,
    check_same_layout,
    check_tensor,
    counter_tensor,
    on_device,
    traceable,
    use_triton,
)
from .draws import draw_length, draw_normal, draw_uniform, logical_index
from .philox import normals_from_words, philox4x32, split64, uniform_from_word

Kind = Literal["uniform", "l2", "normal"]

NORMAL_SCALE = 0.001
_BLOCK = 1024


# -------------------------------------------------------------------------------- reference twin


def random_start_reference(
    x: Tensor, eps: float | Tensor, seed: Tensor, offset: Tensor, kind: str = "uniform", clamp: bool = True
) -> Tensor:
    """The start in plain PyTorch, in dtype and layout of x; `uniform` equals the kernel bit for bit."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device).view(x.shape)
    index = torch.empty_like(x, dtype=torch.int64).copy_(index)
    words = philox4x32(seed, *split64(index), *split64(offset))
    if kind == "uniform":
        noise = (2.0 * uniform_from_word(words[0]) - 1.0).to(x.dtype) * eps
    else:
        noise = normals_from_words(words[0], words[1])[0].to(x.dtype)
        if kind == "normal":
            noise = NORMAL_SCALE * noise
        else:
            axes = tuple(range(1, x.ndim))
            first = index.flatten(1)[:, 0].view(-1, *[1] * (x.ndim - 1))
            word = philox4x32(seed, *split64(first), *split64(offset))[2]
            size = torch.linalg.vector_norm(noise, dim=axes, keepdim=True)
            noise = noise * (uniform_from_word(word).to(x.dtype) * eps / size)
    start = x + noise
    return start.clamp(0, 1) if clamp else start


# --------------------------------------------------------------------------------------- kernels


@triton.jit
def _random_start_kernel(
    x,
    out,
    low_precision,
    seed_pointer,
    offset_pointer,
    eps_tensor,
    eps_value,
    EPS_TENSOR: tl.constexpr,
    NORMAL: tl.constexpr,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = None if EVEN else place < PIXELS * CHANNELS
    memory = image * (PIXELS * CHANNELS) + place
    seed, offset = tl.load(seed_pointer), tl.load(offset_pointer)
    eps = amount(eps_tensor, eps_value, EPS_TENSOR)
    index = logical_index(place, PIXELS, CHANNELS, LAST)
    centre = tl.load(x + memory, mask=inside)
    if NORMAL:
        start = centre + SCALE * draw_normal(seed, offset, image, index, PIXELS, CHANNELS)
    else:
        noise = (2.0 * draw_uniform(seed, offset, image, index, PIXELS, CHANNELS) - 1.0) * eps
        # Between the product and the sum, so that no fused multiply-add rounds differently from the twin.
        start = centre + clamp_keeping_nan(noise, -eps, eps)
    if CLAMP:
        start = clamp_keeping_nan(start, 0.0, 1.0)
    tl.store(out + memory, start, mask=inside)
    if LOW_PRECISION:
        tl.store(low_precision + memory, start.to(low_precision.dtype.element_ty), mask=inside)


@triton.jit
def _random_start_l2_kernel(
    x,
    out,
    low_precision,
    seed_pointer,
    offset_pointer,
    eps_tensor,
    eps_value,
    numel,
    EPS_TENSOR: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program an image; the normals are drawn twice, which is cheaper than keeping them in memory."""
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    seed, offset = tl.load(seed_pointer), tl.load(offset_pointer)
    eps = amount(eps_tensor, eps_value, EPS_TENSOR)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, numel, BLOCK):
        index = start + lane
        normal = draw_normal(seed, offset, image, index, PIXELS, CHANNELS)
        squares += tl.where(index < numel, normal * normal, 0.0)
    length = draw_length(seed, offset, image, PIXELS, CHANNELS) * eps
    factor = tl.div_rn(length, tl.sqrt_rn(tl.sum(squares, 0)))
    for start in range(0, numel, BLOCK):
        place = start + lane
        inside = None if EVEN else place < numel
        memory = image * numel + place
        centre = tl.load(x + memory, mask=inside)
        index = logical_index(place, PIXELS, CHANNELS, LAST)
        result = centre + factor * draw_normal(seed, offset, image, index, PIXELS, CHANNELS)
        if CLAMP:
            result = clamp_keeping_nan(result, 0.0, 1.0)
        tl.store(out + memory, result, mask=inside)
        if LOW_PRECISION:
            tl.store(low_precision + memory, result.to(low_precision.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------ launcher and op


def _launch(
    x: Tensor,
    out: Tensor,
    low_precision: Tensor | None,
    eps: float | Tensor,
    seed: Tensor,
    offset: Tensor,
    kind: str,
    clamp: bool,
) -> None:
    eps_tensor, eps_value, eps_from_tensor = amount_arguments(eps, x)
    last = not x.is_contiguous()
    channels = x.shape[1] if last else 1
    count, numel = x.shape[0], x.numel() // x.shape[0]
    block = triton.next_power_of_2(numel) if INTERPRETING else _BLOCK
    copy = out if low_precision is None else low_precision
    arguments = (x, out, copy, seed, offset, eps_tensor, eps_value)
    meta: dict[str, object] = {
        "EPS_TENSOR": eps_from_tensor,
        "CLAMP": clamp,
        "LOW_PRECISION": low_precision is not None,
        "PIXELS": numel // channels,
        "CHANNELS": channels,
        "LAST": last,
        "EVEN": numel % block == 0,
        "BLOCK": block,
        "num_warps": 4,
    }
    if kind == "l2":
        with on_device(x):
            traceable(_random_start_l2_kernel)[(count,)](*arguments, numel, **meta)
    else:
        with on_device(x):
            traceable(_random_start_kernel)[(count, triton.cdiv(numel, block))](
                *arguments, NORMAL=kind == "normal", SCALE=NORMAL_SCALE, **meta
            )


@triton_op("arat_fast::random_start", mutates_args={"low_precision"})
def _random_start(
    x: Tensor,
    low_precision: Tensor | None,
    eps_tensor: Tensor | None,
    eps_value: float,
    seed: Tensor,
    offset: Tensor,
    kind: str,
    clamp: bool,
) -> Tensor:
    eps = eps_value if eps_tensor is None else eps_tensor
    if use_triton(x) and x.dtype == torch.float32 and x.numel() > 0:
        start = torch.empty_like(x)
        _launch(x, start, low_precision, eps, seed, offset, kind, clamp)
        return start
    start = random_start_reference(x, eps, seed, offset, kind, clamp)
    if low_precision is not None:
        low_precision.copy_(start)
    return start


def random_start(
    x: Tensor,
    eps: float | Tensor,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    kind: Kind = "uniform",
    clamp: bool = True,
    low_precision_out: Tensor | None = None,
) -> Tensor:
    """A random point round each image, in the layout of x.

    x: (N, C, H, W) or (N, …) of fp32 (float64 runs in plain PyTorch), pixels in [0, 1], channels-last or
    contiguous. eps: a number in pixel units or a 0-d fp32 tensor on the device; `normal` does not use it.
    seed, offset: ints, or 0-d int64 tensors on the device, which a captured CUDA graph reads anew at each
    replay; two offsets share no number. kind: `uniform` in the Linf ball; `l2`, a normal direction of
    uniform length up to eps; `normal`, 0.001 times a standard normal. clamp: to [0, 1]; False is the start
    of the ARAT authors' code. low_precision_out: a bf16 or fp16 tensor like x that receives a copy from the
    same launch. Not differentiable.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or layout, an unknown kind, or
    eps negative or not finite.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; expected one of {get_args(Kind)}")
    check_tensor("x", x, (torch.float32, torch.float64))
    if x.ndim == 0:
        raise ValueError("x has no dimension; expected images of shape (N, C, H, W) or (N, …)")
    check_amount("eps", eps, x)
    tensors = {"x": x}
    if low_precision_out is not None:
        check_tensor("low_precision_out", low_precision_out, HALF_DTYPES)
        check_same("low_precision_out", low_precision_out, "x", x)
        tensors["low_precision_out"] = low_precision_out
    check_same_layout(**tensors)
    seed, offset = counter_tensor("seed", seed, x), counter_tensor("offset", offset, x)
    eps_tensor, eps_value = (eps, 0.0) if isinstance(eps, Tensor) else (None, float(eps))
    with torch.no_grad():
        return _random_start(  # type: ignore[no-any-return]
            x, low_precision_out, eps_tensor, eps_value, seed, offset, kind, clamp
        )


def compile_cases() -> Iterator[CompileCase]:
    """CIFAR images, channels-last: every kind, without and with a bf16 or fp16 copy."""
    x, number, scalar = torch.zeros(3 * _BLOCK), torch.zeros((), dtype=torch.int64), torch.zeros(())
    for copy in (torch.float32, torch.bfloat16, torch.float16):
        for kind in get_args(Kind):
            meta: dict[str, object] = {
                "EPS_TENSOR": True,
                "CLAMP": kind != "normal",  # as training launches it: the first step clamps
                "LOW_PRECISION": copy != torch.float32,
                "PIXELS": 1024,
                "CHANNELS": 3,
                "LAST": True,
                "EVEN": True,
                "BLOCK": _BLOCK,
                "num_warps": 4,
            }
            more = () if kind != "l2" else (x.numel(),)
            meta |= {} if kind == "l2" else {"NORMAL": kind == "normal", "SCALE": NORMAL_SCALE}
            yield CompileCase(
                _random_start_l2_kernel if kind == "l2" else _random_start_kernel,
                f"{kind}, {'no' if copy == torch.float32 else str(copy).removeprefix('torch.')} copy",
                (x, x, x.to(copy), number, number, scalar, 0.25, *more),
                meta,
                bfloat16=copy == torch.bfloat16,
            )
