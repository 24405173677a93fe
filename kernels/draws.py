"""Random numbers in a kernel, by the logical index of an image's element; `kernels.philox` is the twin."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import uint_to_uniform_float


@triton.jit
def logical_index(place, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The (C, H, W) index of the element at `place` in an image's memory."""
    if LAST:
        place = (place % CHANNELS) * PIXELS + place // CHANNELS
    return place


@triton.jit
def draw(seed, offset, image, index, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The Philox words of elements `index` of `image`, for the stream `offset`."""
    counter = image * (PIXELS * CHANNELS) + index.to(tl.int64)
    low = counter.to(tl.uint32)
    zero = low * 0
    return tl.philox(
        seed,
        low,
        (counter >> 32).to(tl.uint32),
        zero + offset.to(tl.uint32),
        zero + (offset >> 32).to(tl.uint32),
    )


@triton.jit
def draw_uniform(seed, offset, image, index, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """fp32 uniforms in [0, 1)."""
    word, _, _, _ = draw(seed, offset, image, index, PIXELS, CHANNELS)
    return uint_to_uniform_float(word)


@triton.jit
def cosine_of_turns(turns):
    """cos(2·pi·turns) for turns in [0, 1), to 2e-7.

    By symmetry minus the sine of a quarter turn at most, whose series to the 11th power errs by 6e-8. The
    library's cosine takes any angle: its slow path costs a stack, and spilled registers on sm_75 and sm_80.
    """
    z = 6.283185307179586 * (tl.abs(turns - 0.5) - 0.25)
    square = z * z
    series = -2.505210838544172e-08 * square + 2.755731922398589e-06
    series = series * square - 1.984126984126984e-04
    series = series * square + 8.333333333333333e-03
    series = series * square - 1.666666666666667e-01
    return z + z * square * series


@triton.jit
def draw_normal(seed, offset, image, index, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """fp32 standard normals; of the same words as the uniforms."""
    first, second, _, _ = draw(seed, offset, image, index, PIXELS, CHANNELS)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(uint_to_uniform_float(first), 1.0e-7)))
    return radius * cosine_of_turns(uint_to_uniform_float(second))


@triton.jit
def draw_length(seed, offset, image, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """One fp32 uniform in [0, 1) an image: the third word of its first element, which no normal uses."""
    _, _, third, _ = draw(seed, offset, image, tl.zeros((1,), tl.int32), PIXELS, CHANNELS)
    return tl.sum(uint_to_uniform_float(third), 0)
