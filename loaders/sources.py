"""Data sets by name."""

from __future__ import annotations

from arat_fast.errors import unknown_name
from arat_fast.loaders.cifar import LAYOUTS, load_cifar
from arat_fast.loaders.digits import load_digits
from arat_fast.loaders.images import ImageSet

DATASETS = ("digits", *LAYOUTS)
# What `--dry-run` needs without reading a file: (H, W, C), classes, training images.
SHAPES = {
    "digits": ((8, 8, 1), 10, 1_442),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
}


def check_dataset(name: str) -> None:
    """Raise UserError with the nearest known name unless `name` is a data set."""
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)


def load(name: str, root: str | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, test) images of the named data set. Raises UserError for an unknown name or unreadable data."""
    check_dataset(name)
    return load_digits() if name == "digits" else load_cifar(name, root)
