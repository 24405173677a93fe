"""A data set in memory: uint8 images in NHWC order and their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arat_fast.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 (N, H, W, C); labels: int64 (N,) in [0, num_classes); `source` names where they were
    read.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_classes: int
    source: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UserError(
                f"{self.source}: images are {self.images.dtype} of shape {self.images.shape}; "
                "expected uint8 (N, H, W, C)"
            )
        if self.labels.shape != (len(self.images),):
            raise UserError(f"{self.source}: {len(self.images)} images but {self.labels.size} labels")
        if len(self.labels) == 0:
            raise UserError(f"{self.source}: no images")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"{self.source}: labels run from {low} to {high}; expected 0 to {self.num_classes - 1}. "
                "The file is damaged or belongs to another data set"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.num_classes, self.source)

    def first(self, count: int) -> ImageSet:
        """The first `count` images; all of them for 0 or a larger count."""
        return self if count == 0 or count >= len(self) else self.take(np.arange(count))

    def split(self, held_out: int, seed: int) -> tuple[ImageSet, ImageSet]:
        """(rest, held-out) images; which ones are held out depends on the seed alone.

        Raises UserError where nothing would be left to train on.
        """
        if held_out >= len(self):
            raise UserError(
                f"cannot hold out {held_out} of {len(self)} training images; give a smaller --validation"
            )
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))
