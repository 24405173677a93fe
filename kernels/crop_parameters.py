"""How each sample is cropped and flipped: a hash of (seed, epoch, sample index), the same for every loader.

A sample's parameters do not depend on its batch, its worker, the order or a restart. Philox with key `seed`
and counter (sample index, epoch, purpose) gives four words a sample; the functions take torch tensors or
NumPy arrays of int64, so a loader's workers, the CPU and the GPU's kernel agree exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import Words, below, philox4x32, split64

# The last counter word: what a stream is for. Random starts use 64-bit offsets there, of which these would be
# the high half, so one seed can serve all.
CROP_AND_FLIP = 0x43524F50
RESIZED_CROP = 0x52535A00
TRIES = 10


def sample_words(
    sample_indices: Words, seed: Words, epoch: Words, purpose: int
) -> tuple[Words, Words, Words, Words]:
    """Four words in [0, 2^32) a sample; seed and epoch are int64 tensors or arrays of one element."""
    return philox4x32(seed, *split64(sample_indices), split64(epoch)[0], epoch * 0 + purpose)


def crop_flip_parameters(
    sample_indices: Words, seed: Words, epoch: Words, padding: int = 4, flip: bool = True
) -> tuple[Words, Words, Words]:
    """(top, left, flip) of a crop from the image padded with `padding` zeros on every side.

    sample_indices: int64 of any shape, each sample's place in the data set. seed, epoch: int64 of one
    element (0-d tensors, or NumPy arrays of shape (1,); NumPy scalars would warn of the overflow that a
    hash lives on). top, left: in [0, 2·padding], the window's corner in the padded image, as torchvision's
    RandomCrop. flip: 0 or 1. All int64 of the shape of sample_indices.
    """
    first, second, third, _ = sample_words(sample_indices, seed, epoch, CROP_AND_FLIP)
    choices = 2 * padding + 1
    return below(first, choices), below(second, choices), (third >> 31) * int(flip)


def resized_crop_parameters(
    sample_indices: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(top, left, crop height, crop width, flip) of a random resized crop, for photos of any size.

    sample_indices: int64 (N,). height, width: each image's, int64 (N,) or one number. scale: range of the
    crop's share of the area; ratio: range of width / height, drawn log-uniformly. torchvision's
    RandomResizedCrop: the first of ten tries that fits, else the largest central crop within the ratios.
    All int64 (N,).

    Raises ValueError for an empty range, or scale or ratio that is not positive.
    """
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high < math.inf:
            raise ValueError(f"{name} is {(low, high)}; expected two positive numbers, the smaller first")
    device = sample_indices.device
    seed, epoch, height, width = (
        torch.as_tensor(value, dtype=torch.int64, device=device) for value in (seed, epoch, height, width)
    )
    height, width = height.expand_as(sample_indices), width.expand_as(sample_indices)
    area = (height * width).double()

    # Every try of every sample at once: (TRIES, N), in float64.
    attempt = torch.arange(TRIES, device=device).view(-1, 1)
    counters = split64(sample_indices)
    words = philox4x32(seed, *counters, split64(epoch)[0], attempt + RESIZED_CROP)
    share, log_ratio = ((word.double() + 0.5) / 2**32 for word in words[:2])
    target = area * (scale[0] + share * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + log_ratio * (math.log(ratio[1]) - math.log(ratio[0])))
    crop_width = torch.round(torch.sqrt(target * aspect)).long()
    crop_height = torch.round(torch.sqrt(target / aspect)).long()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    crop_width, crop_height, top, left = (
        tries.gather(0, first).squeeze(0)
        for tries in (
            crop_width,
            crop_height,
            below(words[2], (height - crop_height + 1).clamp_min(1)),
            below(words[3], (width - crop_width + 1).clamp_min(1)),
        )
    )

    shape = width.double() / height.double()
    wide, tall = shape > ratio[1], shape < ratio[0]
    central_width = torch.where(wide, torch.round(height * ratio[1]).long(), width)
    central_height = torch.where(tall, torch.round(width / ratio[0]).long(), height)
    crop_width = torch.where(found, crop_width, central_width)
    crop_height = torch.where(found, crop_height, central_height)
    top = torch.where(found, top, (height - crop_height) // 2)
    left = torch.where(found, left, (width - crop_width) // 2)
    _, _, flip = crop_flip_parameters(sample_indices, seed, epoch)
    return top, left, crop_height, crop_width, flip
