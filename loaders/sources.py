"""Data sets by name, and their prepared `.beton` files."""

from __future__ import annotations

from pathlib import Path

from arat_fast.errors import UserError, unknown_name
from arat_fast.loaders.beton_set import load_beton
from arat_fast.loaders.cifar import LAYOUTS, load_cifar
from arat_fast.loaders.digits import load_digits
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.photos import load_folder
from arat_fast.loaders.svhn import load_svhn
from arat_fast.loaders.tiny_imagenet import load_tiny_imagenet

DATASETS = ("digits", *LAYOUTS, "svhn", "tiny-imagenet", "imagenette", "folder")
# What `--dry-run` needs without reading a file: (H, W, C), classes, training images; of folder, ImageNet's.
SHAPES = {
    "digits": ((8, 8, 1), 10, 1_442),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "svhn": ((32, 32, 3), 10, 73_257),
    "tiny-imagenet": ((64, 64, 3), 200, 100_000),
    "imagenette": ((160, 160, 3), 10, 9_469),
    "folder": ((224, 224, 3), 1_000, 1_281_167),
}
PHOTOS = ("imagenette", "folder")  # images of any size, cropped and resized to a square
IMAGENETTE_FOLDERS = ("imagenette2-160", "imagenette2-320", "imagenette2")
PARTS = ("train", "test")


def check_dataset(name: str) -> None:
    """Raise UserError with the nearest known name unless `name` is a data set."""
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)


def beton_paths(name: str, folder: Path) -> tuple[Path, Path]:
    """Where `arat-fast data prepare` puts a data set's training and test images."""
    return folder / f"{name}-train.beton", folder / f"{name}-test.beton"


def load(name: str, root: str | None = None, side: int = 0) -> tuple[ImageSource, ImageSet]:
    """(train, test) images of the named data set; test images are in memory, photos cropped at the centre.

    A folder with `.beton` files of the data set is preferred to one with its originals. side: of photos'
    squares in pixels; 0: 160 for imagenette, 224 for folder, or what the file was prepared for.

    Raises UserError for an unknown name or unreadable data.
    """
    check_dataset(name)
    if root is not None and beton_paths(name, Path(root))[0].exists():
        train, test = (_prepared(name, path, side) for path in beton_paths(name, Path(root)))
        if train.num_classes != test.num_classes:
            raise UserError(
                f"{train.source} has {train.num_classes} classes and {test.source} {test.num_classes}: they "
                "are not of one data set; write both again with `arat-fast data prepare`"
            )
        return train, test.in_memory()
    train, test = load_original(name, root, side)
    return train, test.in_memory()


def load_original(name: str, root: str | None = None, side: int = 0) -> tuple[ImageSource, ImageSource]:
    """(train, test) images of the named data set from its original files."""
    check_dataset(name)
    if name == "digits":
        return load_digits()
    if name in LAYOUTS:
        return load_cifar(name, root)
    if name == "svhn":
        return load_svhn(root)
    if name == "tiny-imagenet":
        return load_tiny_imagenet(root)
    side = side or SHAPES[name][0][0]
    if name == "imagenette" and root is not None:
        inner = (str(Path(root) / folder) for folder in IMAGENETTE_FOLDERS if (Path(root) / folder).is_dir())
        root = next(inner, root)
    return load_folder(root, side, name)


def _prepared(name: str, path: Path, side: int) -> ImageSource:
    shape, classes, _ = SHAPES[name]
    if name in PHOTOS:
        return load_beton(path, side=side or SHAPES[name][0][0])
    return load_beton(path, shape=shape, num_classes=classes)
