"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): torchvision's Python layout and the official binary layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arat_fast.errors import UserError
from arat_fast.loaders.images import ImageSet

log = logging.getLogger(__name__)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where a CIFAR data set's files are and how many records each holds."""

    torchvision_class: str
    python_folder: str
    binary_folder: str
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int  # CIFAR-100 has a coarse label before the fine one
    train_records: int
    num_classes: int


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR10",
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        1,
        10_000,
        10,
    ),
    "cifar100": Layout(
        "CIFAR100", "cifar-100-python", "cifar-100-binary", ("train.bin",), "test.bin", 2, 50_000, 100
    ),
}
TEST_RECORDS = 10_000


def load_cifar(name: str, root: str | None) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "cifar10" or "cifar100" below `root`, in either layout; binary first.

    With no root, ./data is used and the set is downloaded there by torchvision when absent. Raises UserError
    that says what was looked for, for a folder without the set, a file of the wrong size, or labels out of
    range.
    """
    layout = LAYOUTS[name]
    folder = Path(root or "data")
    if root is not None and not folder.is_dir():
        raise UserError(
            f"--data-root {root}: no such folder; give the one that holds {layout.binary_folder}/"
        )
    for candidate in (folder / layout.binary_folder, folder):
        if (candidate / layout.test_file).is_file():
            return _read_binary(layout, candidate)
    for candidate in (folder, folder.parent):
        if (candidate / layout.python_folder).is_dir() and (candidate == folder or _named(folder, layout)):
            return _read_python(layout, candidate, download=False)
    if root is None:
        log.info("%s is not in %s; asking torchvision to download it", name, folder)
        return _read_python(layout, folder, download=True)
    raise UserError(
        f"--data-root {root} holds no {name}: expected {layout.python_folder}/ (torchvision's layout) or "
        f"{layout.binary_folder}/ (the official binary version) in it"
    )


def _named(folder: Path, layout: Layout) -> bool:
    return folder.resolve().name == layout.python_folder


def _read_binary(layout: Layout, folder: Path) -> tuple[ImageSet, ImageSet]:
    parts = [_read_records(folder / f, layout, layout.train_records) for f in layout.train_files]
    images = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    train = ImageSet(images, labels, layout.num_classes, str(folder))
    test = ImageSet(
        *_read_records(folder / layout.test_file, layout, TEST_RECORDS), layout.num_classes, str(folder)
    )
    return train, test


def _read_records(path: Path, layout: Layout, records: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    size = layout.label_bytes + PIXELS
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Unpack the data set again") from None
    if raw.size != records * size:
        raise UserError(
            f"{path} has {raw.size:,} bytes; expected {records:,} records of {size} = {records * size:,}. "
            "It is cut short or no CIFAR file: unpack the data set again"
        )
    table = raw.reshape(records, size)
    labels = table[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.num_classes:
        raise UserError(
            f"{path} holds the label {labels.max()}; expected 0 to {layout.num_classes - 1}. "
            "It is damaged or of another data set: unpack it again"
        )
    pixels = table[:, layout.label_bytes :].reshape(records, 3, 32, 32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


def _read_python(layout: Layout, folder: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    from arat_fast.loaders.torchvision_import import torchvision

    dataset = getattr(torchvision.datasets, layout.torchvision_class)
    sets = []
    for train in (True, False):
        try:
            loaded = dataset(str(folder), train=train, download=download)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
            where = folder / layout.python_folder
            remedy = (
                "no network? Put the data set there by hand, or give --data-root"
                if download
                else "its files are missing or damaged (checksum): unpack the archive again"
            )
            raise UserError(f"cannot read {where}: {error}; {remedy}") from None
        labels = np.asarray(loaded.targets, dtype=np.int64)
        sets.append(ImageSet(loaded.data, labels, layout.num_classes, str(folder / layout.python_folder)))
    return sets[0], sets[1]
