"""Tiny-ImageNet: 200 classes, 500 training and 50 validation JPEG images of 64 x 64 each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arat_fast.errors import UserError
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.photos import PhotoSet, class_folders, read_folder

FOLDER = "tiny-imagenet-200"
SIDE = 64


def load_tiny_imagenet(root: str | None) -> tuple[ImageSet, ImageSet]:
    """(train, validation) in memory (1.2 GB), from train/CLASS/images/*.JPEG and val/.

    val/ is as published (images/ and val_annotations.txt) or sorted into class folders. Decoding takes about
    20 s; `arat-fast data prepare` does it once. Raises UserError for what is missing or damaged.
    """
    if root is None:
        raise UserError(f"the data set tiny-imagenet needs --data-root: the folder that holds {FOLDER}/")
    base = Path(root) / FOLDER if (Path(root) / FOLDER).is_dir() else Path(root)
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise UserError(f"--data-root {root} holds no {FOLDER}/{part}: unpack Tiny-ImageNet there")
    classes = class_folders(base / "train")
    if not classes:
        raise UserError(f"{base / 'train'} has no class folders: unpack Tiny-ImageNet again")
    train = read_folder(base / "train", classes, SIDE, "images")
    annotations = base / "val" / "val_annotations.txt"
    if annotations.is_file():
        validation = _annotated(annotations, classes)
    else:
        validation = read_folder(base / "val", classes, SIDE)
    return _decoded(train), _decoded(validation)


def _annotated(file: Path, classes: list[str]) -> PhotoSet:
    paths, labels = [], []
    numbers = {name: label for label, name in enumerate(classes)}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = numbers.get(rest.split("\t")[0])
        if label is None:
            raise UserError(f"{file}, line {number}: no class of train/ in {line[:60]!r}; unpack it again")
        paths.append(file.parent / "images" / name)
        labels.append(label)
    return PhotoSet(tuple(paths), np.array(labels, np.int64), len(classes), str(file.parent), SIDE)


def _decoded(photos: PhotoSet) -> ImageSet:
    images = np.empty((len(photos), SIDE, SIDE, 3), np.uint8)
    for index in range(len(photos)):
        image = photos.image(index)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{photos.paths[index]} is {image.shape[1]} x {image.shape[0]}; expected {SIDE} x {SIDE}: it "
                "is no Tiny-ImageNet image. Unpack the data set again"
            )
        images[index] = image
    return ImageSet(images, photos.labels, photos.num_classes, photos.source)
