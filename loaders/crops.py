"""Photos of any size to squares: hashed random resized crops for training, a central crop for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from arat_fast.errors import UserError
from arat_fast.kernels.crop_parameters import resized_crop_parameters


@dataclass(frozen=True)
class ResizedCrop:
    """A square of `side` pixels: a crop of a random share and aspect ratio, resized (torchvision's
    defaults).
    """

    side: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def boxes(
        self,
        indices: NDArray[np.int64],
        heights: NDArray[np.int64],
        widths: NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
    ) -> NDArray[np.int64]:
        """(N, 4): top, left, height and width of each sample's crop, hashed from (seed, epoch, index)."""
        top, left, height, width, _ = resized_crop_parameters(
            torch.from_numpy(indices),
            torch.from_numpy(heights),
            torch.from_numpy(widths),
            seed=seed,
            epoch=epoch,
            scale=self.scale,
            ratio=self.ratio,
        )
        return torch.stack([top, left, height, width], 1).numpy()


def central_square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """What evaluation sees, uint8 (side, side, 3): the shorter side made side · 256/224, then the centre.

    Equal to torchvision's Resize and CenterCrop of a Pillow image.
    """
    shorter = round(side * 256 / 224)
    scale = shorter / min(image.size)
    width, height = (shorter if s == min(image.size) else int(s * scale) for s in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def crop_and_resize(image: Image.Image, box: tuple[int, int, int, int], side: int) -> NDArray[np.uint8]:
    """The (top, left, height, width) part of an image as uint8 (side, side, 3), bilinear with antialiasing.

    Equal to torchvision's resized_crop of a Pillow image.
    """
    top, left, height, width = (int(value) for value in box)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))


def open_image(data: Path | bytes, name: str) -> Image.Image:
    """A decoded RGB image from a file or its bytes; UserError naming it where it is damaged or no image."""
    try:
        with Image.open(BytesIO(data) if isinstance(data, bytes) else data) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, or damaged beyond recognition"
        raise UserError(f"cannot read the image {name}: {reason}. Restore or remove it") from None
