"""Random crop, horizontal flip and uint8 -> [0, 1] in one launch, from NHWC bytes to a channels-last batch.

    out[n, c, h, w] = image[top + h - p, left + w' - p, c] / 255, or 0 outside
    w' = W - 1 - w where flipped, else w

with top, left and flip hashed from (seed, epoch, sample index): `kernels.crop_parameters`. The images are
the batch itself, or a data set resident on the device from which the same pass gathers. 1 byte is read and
4 (fp32) or 2 (bf16, fp16) written per element: a chain of gather, pad, crop, flip, convert, divide moves
more than ten times that.

Values are x / 255 correctly rounded, as torchvision's ToTensor has them, then rounded to the half precision
asked for: twin and kernel are bit-equal. Multiplying by 1/255 would be an ulp off for 126 of the 256
values.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .augment_cpu import random_crop_flip_cpu
from .compile_cases import CompileCase
from .crop_parameters import CROP_AND_FLIP, crop_flip_parameters
from .dispatch import (
    FLOAT_DTYPES,
    INTERPRETING,
    check_device,
    check_tensor,
    counter_tensor,
    on_device,
    traceable,
    use_triton,
)

# 1/255 as a sum: k times the first, of 16 bits, is exact for bytes k, so the sum rounds once, fused or not.
_HIGH = 0.0039215087890625
_LOW = 5.983839201917363e-08
_ELEMENTS = 4096  # of a program's tile: enough that its one Philox is a small part


def random_crop_flip_reference(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    epoch: Tensor,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    resident: bool,
) -> Tensor:
    """The augmented batch in plain PyTorch, equal to the kernel's bit for bit."""
    _, height, width, _ = images.shape
    top, left, flipped = crop_flip_parameters(indices, seed, epoch, padding, flip)
    row = torch.arange(height, device=images.device) + top[:, None] - padding
    place = torch.arange(width, device=images.device)
    column = torch.where(flipped[:, None] == 1, width - 1 - place, place) + left[:, None] - padding
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None, :]
    source = indices if resident else torch.arange(images.shape[0], device=images.device)
    cropped = images[
        source[:, None, None],
        row.clamp(0, height - 1)[:, :, None],
        column.clamp(0, width - 1)[:, None, :],
    ]
    pixels = torch.where(inside[..., None], cropped, torch.zeros_like(cropped)).to(torch.float32)
    # By a tensor: a GPU divides by a number of the host as it multiplies by its reciprocal.
    pixels = pixels / torch.full((), 255.0, device=images.device)
    return pixels.to(dtype).permute(0, 3, 1, 2)


@triton.jit
def _crop_flip_kernel(
    images,
    indices,
    seed_pointer,
    epoch_pointer,
    out,
    stored,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    RESIDENT: tl.constexpr,
    PURPOSE: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program crops ROWS rows of one image; COLUMNS is a row's bytes, filled up to a power of two."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.load(indices + sample)
    zero = tl.zeros((1,), tl.uint32)
    first, second, third, _ = tl.philox(
        tl.load(seed_pointer),
        zero + index.to(tl.uint32),
        zero + (index >> 32).to(tl.uint32),
        zero + tl.load(epoch_pointer).to(tl.uint32),
        zero + PURPOSE,
    )
    CHOICES: tl.constexpr = 2 * PADDING + 1
    top = ((first.to(tl.uint64) * CHOICES) >> 32).to(tl.int32)
    left = ((second.to(tl.uint64) * CHOICES) >> 32).to(tl.int32)
    flipped = (third >> 31).to(tl.int32) * FLIP

    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, COLUMNS)
    pixel, channel = place // CHANNELS, place % CHANNELS
    from_row = row + top - PADDING
    from_pixel = pixel + flipped * (WIDTH - 1 - 2 * pixel) + left - PADDING
    row_inside = (from_row >= 0) & (from_row < HEIGHT) & (row < HEIGHT)
    pixel_inside = (from_pixel >= 0) & (from_pixel < WIDTH) & (place < WIDTH * CHANNELS)
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    source = index if RESIDENT else sample
    known = (source >= 0) & (source < stored)
    offset = (from_row * (WIDTH * CHANNELS))[:, None] + (from_pixel * CHANNELS + channel)[None, :]
    inside = row_inside[:, None] & pixel_inside[None, :] & known
    value = tl.load(images + source * SIZE + offset, mask=inside, other=0).to(tl.float32)
    value = value * HIGH + value * LOW
    # An index outside the data set cannot raise here; NaN pixels are seen by whatever watches the loss.
    value = tl.where(known, value, float("nan"))
    target = (row * (WIDTH * CHANNELS))[:, None] + place[None, :]
    written = (row < HEIGHT)[:, None] & (place < WIDTH * CHANNELS)[None, :]
    tl.store(out + sample * SIZE + target, value.to(out.dtype.element_ty), mask=written)


def _tile(height: int, width: int, channels: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    columns = triton.next_power_of_2(width * channels)
    rows = height if INTERPRETING else max(1, _ELEMENTS // columns)
    return min(triton.next_power_of_2(rows), triton.next_power_of_2(height)), columns


@triton_op("arat_fast::random_crop_flip", mutates_args={})
def _random_crop_flip(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    epoch: Tensor,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    resident: bool,
) -> Tensor:
    count, (stored, height, width, channels) = indices.shape[0], images.shape
    if not use_triton(images) or count == 0 or images.numel() == 0:
        plain = type(images) is Tensor and type(seed) is Tensor and not torch.compiler.is_compiling()
        if plain and not images.is_cuda and count > 0 and images.numel() > 0:
            return random_crop_flip_cpu(images, indices, seed, epoch, padding, flip, dtype, resident)
        out = random_crop_flip_reference(images, indices, seed, epoch, padding, flip, dtype, resident)
        # Dense channels-last strides also where a side of 1 leaves them open.
        return torch.empty_like(out, memory_format=torch.channels_last).copy_(out)
    out = torch.empty(
        (count, channels, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    rows, columns = _tile(height, width, channels)
    with on_device(images):
        traceable(_crop_flip_kernel)[(count, triton.cdiv(height, rows))](
            images,
            indices,
            seed,
            epoch,
            out,
            stored,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            PADDING=padding,
            FLIP=int(flip),
            RESIDENT=resident,
            PURPOSE=CROP_AND_FLIP,
            HIGH=_HIGH,
            LOW=_LOW,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def random_crop_flip(
    images: Tensor,
    indices: Tensor,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    padding: int = 4,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
    resident: bool = False,
) -> Tensor:
    """Crop, flip and convert a batch: uint8 (N, H, W, C) to `dtype` (N, C, H, W), channels-last, in [0, 1].

    images: uint8, contiguous: the batch (N, H, W, C), or with `resident` the whole data set (M, H, W, C),
    from which the samples are gathered in the same pass. indices: int64 (N,), each sample's place in the
    data set: what is gathered, and what is hashed with seed and epoch into its crop and flip. seed, epoch:
    ints, or 0-d int64 tensors on the device, which a captured CUDA graph reads anew at each replay.
    padding: zeros on every side, 0 for no crop. dtype: float32, bfloat16 or float16.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or layout or a negative
    padding, IndexError for an index outside a resident data set on the CPU; a GPU gives such a sample NaN
    pixels instead.
    """
    check_tensor("images", images, (torch.uint8,), ndim=4)
    check_tensor("indices", indices, (torch.int64,), ndim=1)
    check_device("indices", indices, "images", images)
    for name, tensor in (("images", images), ("indices", indices)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected it contiguous")
    if not resident and indices.shape[0] != images.shape[0]:
        raise ValueError(
            f"indices has {indices.shape[0]} entries; expected {images.shape[0]}, one an image "
            "(with resident=True images is the whole data set)"
        )
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding is {padding!r}; expected an integer of at least 0")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, bfloat16 or float16")
    on_host = not images.is_cuda and not torch.compiler.is_compiling()
    if resident and on_host and indices.numel() > 0:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= images.shape[0]:
            raise IndexError(f"indices reach from {low} to {high}; expected 0 to {images.shape[0] - 1}")
    seed, epoch = counter_tensor("seed", seed, images), counter_tensor("epoch", epoch, images)
    return _random_crop_flip(  # type: ignore[no-any-return]
        images, indices, seed, epoch, padding, flip, dtype, resident
    )


def compile_cases() -> Iterator[CompileCase]:
    """CIFAR and 64-pixel images to each dtype, from a batch and from a resident data set."""
    number, indices = torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for side in (32, 64):
        images = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        rows, columns = _tile(side, side, 3)
        for dtype in FLOAT_DTYPES:
            for resident in (False, True):
                yield CompileCase(
                    _crop_flip_kernel,
                    f"{side} pixels to {str(dtype).removeprefix('torch.')}{', resident' if resident else ''}",
                    (images, indices, number, number, torch.zeros(images.numel(), dtype=dtype), 128),
                    {
                        "HEIGHT": side,
                        "WIDTH": side,
                        "CHANNELS": 3,
                        "PADDING": 4,
                        "FLIP": 1,
                        "RESIDENT": resident,
                        "PURPOSE": CROP_AND_FLIP,
                        "HIGH": _HIGH,
                        "LOW": _LOW,
                        "ROWS": rows,
                        "COLUMNS": columns,
                        "num_warps": 4,
                    },
                    load_bytes=1,  # a crop begins at any byte
                    bfloat16=dtype == torch.bfloat16,
                )
