"""The crops and flips of a run: of every engine, and of what measures beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_fast.config import TrainConfig
from arat_fast.kernels.augment import random_crop_flip
from arat_fast.loaders.sources import PHOTOS
from arat_fast.loaders.stream import Batch


def augmented(config: TrainConfig, batch: Batch, epoch: int) -> Tensor:
    """Cropped and flipped images (N, C, H, W) in [0, 1]: a function of (seed, epoch, index) alone.

    Float images of a user's loader are taken as they are.
    """
    if batch.images.is_floating_point():
        return batch.images.contiguous(memory_format=torch.channels_last)
    return random_crop_flip(
        batch.images,
        batch.indices,
        seed=config.seed,
        epoch=epoch,
        padding=padding_of(config),
        flip=config.flip,
        resident=batch.resident,
    )


def padding_of(config: TrainConfig) -> int:
    """Zeros round an image before its crop: none for photos, which their loader has cropped."""
    return 0 if config.dataset in PHOTOS else config.padding
