"""What a data set is to the rest: labels, images by number, and a set of images in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from arat_fast.errors import UserError


class ImageSource(ABC):
    """Labelled images, in memory or on disk.

    labels: int64 (N,) in [0, num_classes); `source` names where they were read, for messages.
    """

    labels: NDArray[np.int64]
    num_classes: int
    source: str

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a training batch's images."""

    @property
    def is_photos(self) -> bool:
        """Whether images differ in size, so that each is cropped and resized to `image_shape` when read."""
        return False

    @abstractmethod
    def image(self, index: int) -> NDArray[np.uint8]:
        """One image as stored, uint8 (H, W, C). Raises UserError naming the file when it is damaged."""

    @abstractmethod
    def take(self, indices: NDArray[np.int64]) -> Self:
        """The images at `indices`, in that order."""

    @abstractmethod
    def in_memory(self) -> ImageSet:
        """All images as one array; photos resized and cropped at the centre, as for evaluation."""

    def __len__(self) -> int:
        return len(self.labels)

    def images_at(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Images of one size as one array, uint8 (N, H, W, C)."""
        return np.stack([self.image(index) for index in indices])

    def first(self, count: int) -> Self:
        """The first `count` images; all of them for 0 or a larger count."""
        return self if count == 0 or count >= len(self) else self.take(np.arange(count))

    def split(self, held_out: int, seed: int) -> tuple[Self, Self]:
        """(rest, held-out) images; which ones are held out depends on the seed alone.

        Raises UserError where nothing would be left to train on.
        """
        if held_out >= len(self):
            raise UserError(
                f"cannot hold out {held_out} of {len(self)} training images; give a smaller --validation"
            )
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))


def check_labels(labels: NDArray[np.int64], count: int, num_classes: int, source: str) -> None:
    """Raise UserError unless there is a label in [0, num_classes) for each of `count` > 0 images."""
    if labels.shape != (count,):
        raise UserError(f"{source}: {count} images but {labels.size} labels")
    if count == 0:
        raise UserError(f"{source}: no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{source}: labels run from {low} to {high}; expected 0 to {num_classes - 1}. "
            "The file is damaged or belongs to another data set"
        )


@dataclass(frozen=True)
class ImageSet(ImageSource):
    """Images of one size in memory: uint8 (N, H, W, C), and their labels."""

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
        check_labels(self.labels, len(self.images), self.num_classes, self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def image(self, index: int) -> NDArray[np.uint8]:
        """One image, uint8 (H, W, C)."""
        return self.images[index]

    def images_at(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Images as one array, uint8 (N, H, W, C)."""
        return self.images[np.asarray(indices)]

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def in_memory(self) -> ImageSet:
        """Itself."""
        return self
