"""Photos in class folders (the layout of torchvision's ImageFolder): ROOT/train/CLASS/*.jpg and
ROOT/val/CLASS/*.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_fast.errors import UserError
from arat_fast.loaders.crops import central_square, open_image
from arat_fast.loaders.images import ImageSet, ImageSource, check_labels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EVALUATION_FOLDERS = ("val", "test")


@dataclass(frozen=True)
class PhotoSet(ImageSource):
    """Image files of any size and their labels; a batch's images are squares of `side` pixels.

    Training takes a random resized crop of each, evaluation a central one.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    num_classes: int
    source: str
    side: int = 224

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.paths), self.num_classes, self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(side, side, 3)."""
        return self.side, self.side, 3

    @property
    def is_photos(self) -> bool:
        """True."""
        return True

    def open(self, index: int) -> Image.Image:
        """One photo, decoded, RGB. Raises UserError naming the file when it is damaged."""
        return open_image(self.paths[index], str(self.paths[index]))

    def image(self, index: int) -> NDArray[np.uint8]:
        """One photo, uint8 (H, W, 3). Raises UserError naming the file when it is damaged."""
        return np.asarray(self.open(index))

    def take(self, indices: NDArray[np.int64]) -> PhotoSet:
        """The photos at `indices`, in that order."""
        paths = tuple(self.paths[i] for i in indices)
        return replace(self, paths=paths, labels=self.labels[indices])

    def in_memory(self) -> ImageSet:
        """Every photo's central crop, resized to `side`: what is evaluated."""
        return central_crops(self, self.side)


def central_crops(photos: ImageSource, side: int, workers: int = 4) -> ImageSet:
    """The central crop of each photo, resized to `side`, decoded by `workers` threads (Pillow lets them
    run).
    """
    out = np.empty((len(photos), side, side, 3), np.uint8)

    def read(index: int) -> None:
        out[index] = central_square(Image.fromarray(photos.image(index)), side)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(read, range(len(photos))):
            pass
    return ImageSet(out, photos.labels, photos.num_classes, photos.source)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted; a class's place is its label."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def read_folder(folder: Path, classes: Sequence[str], side: int, inner: str = "") -> PhotoSet:
    """The photos of `classes` in `folder`, in the order of their names.

    `inner` is a folder inside each class's. Raises UserError for a class without photos, or a folder that is
    no class.
    """
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        raise UserError(
            f"{folder} has a class folder {unknown[0]!r} that the training photos lack: rename or remove it"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        where = folder / name / inner
        found = sorted(where.rglob("*")) if where.is_dir() else []
        photos = [p for p in found if p.suffix.lower() in EXTENSIONS and p.name[0] != "." and p.is_file()]
        if not photos:
            raise UserError(
                f"{where} holds no photos ({', '.join(EXTENSIONS)}): fill the class folder, or remove the "
                "class from both parts"
            )
        paths += photos
        labels += [label] * len(photos)
    return PhotoSet(tuple(paths), np.array(labels, np.int64), len(classes), str(folder), side)


def load_folder(root: str | None, side: int, known: str = "folder") -> tuple[PhotoSet, PhotoSet]:
    """(train, test) photos below `root`: ROOT/train/CLASS/* and ROOT/val/CLASS/* (or test).

    Raises UserError that says what was looked for.
    """
    if root is None:
        raise UserError(f"the data set {known} needs --data-root: the folder that holds train/ and val/")
    base = Path(root)
    if not (base / "train").is_dir():
        raise UserError(f"--data-root {root} holds no train/: expected train/CLASS/*.jpg and val/CLASS/*.jpg")
    evaluation = next((base / name for name in EVALUATION_FOLDERS if (base / name).is_dir()), None)
    if evaluation is None:
        raise UserError(f"--data-root {root} holds no val/ (or test/): expected val/CLASS/*.jpg")
    classes = class_folders(base / "train")
    if not classes:
        raise UserError(f"{base / 'train'} has no class folders: expected train/CLASS/*.jpg")
    return read_folder(base / "train", classes, side), read_folder(evaluation, classes, side)
