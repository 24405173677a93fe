"""A `.beton` file as a data set, read with NumPy and Pillow: what works where FFCV is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arat_fast.errors import UserError
from arat_fast.loaders.beton import RAW, BetonFile, inspect
from arat_fast.loaders.crops import open_image
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.photos import central_crops


@dataclass(frozen=True)
class BetonSet(ImageSource):
    """Images of a checked `.beton`; `rows` are their places in it, all of them at first.

    side: 0 where all images have one size and are batched as they are; else they are photos, and a batch's
    images are squares of `side` pixels.
    """

    file: BetonFile
    rows: NDArray[np.int64]
    num_classes: int
    side: int = 0

    @property
    def source(self) -> str:  # type: ignore[override]
        """The file's name."""
        return str(self.file.path)

    @property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]
        """int64 (N,)."""
        return self.file.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of a training batch's images."""
        if self.side:
            return self.side, self.side, 3
        height, width = int(self.file.heights[0]), int(self.file.widths[0])
        return height, width, 3

    @property
    def is_photos(self) -> bool:
        """Whether images are cropped and resized to `side`."""
        return self.side != 0

    def image(self, index: int) -> NDArray[np.uint8]:
        """One image as stored, uint8 (H, W, 3). Raises UserError naming file and image when it is damaged."""
        row = int(self.rows[index])
        place, size = int(self.file.places[row]), int(self.file.sizes[row])
        height, width = int(self.file.heights[row]), int(self.file.widths[row])
        try:
            data = np.fromfile(self.file.path, np.uint8, size, offset=place)
        except OSError as error:
            raise UserError(f"cannot read {self.file.path}: {error.strerror}") from None
        if self.file.modes[row] == RAW:
            return data.reshape(height, width, 3)
        name = f"{row} of {self.file.path}"
        image = np.asarray(open_image(data.tobytes(), name))
        if image.shape != (height, width, 3):
            raise UserError(
                f"the image {name} is {image.shape}; expected {(height, width, 3)}: it is damaged"
            )
        return image

    def take(self, indices: NDArray[np.int64]) -> BetonSet:
        """The images at `indices`, in that order."""
        return BetonSet(self.file, self.rows[indices], self.num_classes, self.side)

    def in_memory(self) -> ImageSet:
        """All images as one array; photos cropped at the centre."""
        if self.side:
            return central_crops(self, self.side)
        height, width, _ = self.image_shape
        out = np.empty((len(self), height, width, 3), np.uint8)
        if (self.file.modes[self.rows] == RAW).all():
            data = np.memmap(self.file.path, np.uint8, "r")
            for target, place in zip(out, self.file.places[self.rows].tolist(), strict=True):
                target.reshape(-1)[:] = data[place : place + target.size]
        else:
            for index in range(len(self)):
                out[index] = self.image(index)
        return ImageSet(out, self.labels, self.num_classes, self.source)


def load_beton(
    path: Path, *, shape: tuple[int, int, int] | None = None, num_classes: int | None = None, side: int = 0
) -> BetonSet:
    """A `.beton` as a data set. `shape` (H, W, C) and `num_classes` are what it must hold, where known.

    side: of a batch's squares, for photos; 0: what the file says, else its one size. Raises UserError for a
    damaged file, or one of another data set.
    """
    file = inspect(path)
    classes = int(file.description.get("num_classes", file.labels.max() + 1))
    side = side or int(file.description.get("side", 0))
    if num_classes is not None and classes > num_classes:
        raise UserError(f"{path} has {classes} classes; expected {num_classes}: it is of another data set")
    if file.one_size is None and not side:
        raise UserError(
            f"{path} holds images of several sizes: say to which side they are resized, in pixels"
        )
    if shape is not None and file.one_size != shape[:2]:
        found = "several sizes" if file.one_size is None else "{} x {}".format(*file.one_size)
        raise UserError(
            f"{path} holds images of {found}; expected {shape[0]} x {shape[1]}: it is of another data set. "
            "Write the right one with `arat-fast data prepare`"
        )
    return BetonSet(file, np.arange(len(file.labels)), classes, side)
