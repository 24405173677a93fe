"""The `.beton` format of FFCV (version 2), checked before a file is trusted: FFCV itself checks nothing.

    header | field table | a record an image | padding | pages of image data | allocation table

A record holds mode (0 JPEG, 1 raw), width, height, place and label of an image; the allocation table
repeats every place with its size. FFCV believes all of it: a file cut by one byte gives wrong pixels, a
wrong table a segmentation fault. `inspect` compares them (20 ms for 50,000 images); what is inside the
pages is covered by the checksum beside the file.

Source: ffcv 1.0.2, types.py and writer.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arat_fast.errors import UserError

log = logging.getLogger(__name__)

VERSION = 2
JPEG, RAW = 0, 1
RGB_IMAGE, INTEGER = 2, 1  # types of fields
FIELD_TYPES = {0: "float", 1: "int", 2: "rgb_image", 3: "bytes", 4: "ndarray", 5: "json", 6: "tensor"}
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
# A gigabyte takes about a second to hash; larger files are checked by `arat-fast data check`.
CHECKSUM_LIMIT = 4 << 30

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
RECORD = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])

AGAIN = "write it again with `arat-fast data prepare`"


@dataclass(frozen=True)
class BetonFile:
    """A checked file. All arrays have an entry an image.

    places, sizes: uint64, where its bytes are; widths, heights: int64; modes: uint8, JPEG or RAW; labels:
    int64. `description` is what `data prepare` wrote about the data set; empty for a file of another origin.
    """

    path: Path
    field_names: tuple[str, str]
    page_size: int
    places: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    modes: NDArray[np.uint8]
    labels: NDArray[np.int64]
    description: dict[str, Any]

    @property
    def one_size(self) -> tuple[int, int] | None:
        """(H, W) where all images have it, else None."""
        heights, widths = self.heights, self.widths
        same = (heights == heights[0]).all() and (widths == widths[0]).all()
        return (int(heights[0]), int(widths[0])) if same else None


def checksum_path(path: Path) -> Path:
    """The file beside a `.beton` that holds its SHA-256, as sha256sum writes it."""
    return path.with_name(path.name + ".sha256")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path) -> bool:
    """Whether there is a checksum to compare with. Raises UserError when the file does not match it."""
    beside = checksum_path(path)
    if not beside.exists():
        return False
    words = beside.read_text(errors="replace").split()
    if not words or words[0] != file_digest(path):
        raise UserError(
            f"{path} does not match its checksum {beside.name}: it is damaged or was exchanged; {AGAIN}"
        )
    return True


def inspect(path: Path, checksum: bool | None = None) -> BetonFile:
    """Read and check a `.beton` of one RGB image and one integer label a record.

    checksum: compare with the SHA-256 beside the file; None: where there is one and the file is no larger
    than 4 GiB. Raises UserError that names the file, what is wrong with it and what to do.
    """
    try:
        size = path.stat().st_size
        beton = _inspect(path, size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {AGAIN}") from None
    if checksum is None and size > CHECKSUM_LIMIT and checksum_path(path).exists():
        log.info("%s is large: its checksum is left to `arat-fast data check %s`", path, path)
    elif checksum is not False and not check_digest(path):
        log.warning("%s has no checksum beside it: damaged pixels would go unnoticed", path)
    return beton


def _inspect(path: Path, size: int) -> BetonFile:
    if size == 0:
        raise UserError(f"{path} is empty; {AGAIN}")
    if size < HEADER.itemsize:
        raise UserError(f"{path} is no .beton file, or cut short: it has {size} bytes; {AGAIN}")
    header = np.fromfile(path, HEADER, 1)[0]
    page = int(header["page_size"])
    if header["version"] != VERSION or page & (page - 1) or not MIN_PAGE <= page <= MAX_PAGE:
        raise UserError(
            f"{path} is no .beton file of version {VERSION}: give one that FFCV 1.0 or this wrote"
        )
    names, arguments = _field_table(path, int(header["fields"]), size)
    count, table = int(header["samples"]), int(header["table"])
    begin = HEADER.itemsize + int(header["fields"]) * FIELD.itemsize
    if count == 0:
        raise UserError(f"{path} holds no images; {AGAIN}")
    if table == 0:
        raise UserError(f"{path} was not finished by whatever wrote it; {AGAIN}")
    if table + count * ALLOCATION.itemsize != size or begin + count * RECORD.itemsize > table:
        expected = table + count * ALLOCATION.itemsize
        raise UserError(
            f"{path} has {size:,} bytes; expected {expected:,} for {count:,} images. It is cut short or "
            f"damaged; {AGAIN}"
        )
    records = np.fromfile(path, RECORD, count, offset=begin)
    allocations = np.fromfile(path, ALLOCATION, count, offset=table)
    sizes = _sizes(path, records, allocations, begin + count * RECORD.itemsize, table)
    image, labels = records["f0"], records["f1"].astype(np.int64)
    description = _description(arguments)
    classes = description.get("num_classes", int(labels.max()) + 1)
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path} holds labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}. It is "
            f"damaged; {AGAIN}"
        )
    return BetonFile(
        path, names, page, image["place"].copy(), sizes, image["width"].astype(np.int64),
        image["height"].astype(np.int64), image["mode"].copy(), labels, description,
    )  # fmt: skip


def _field_table(path: Path, fields: int, size: int) -> tuple[tuple[str, str], bytes]:
    if HEADER.itemsize + fields * FIELD.itemsize > size:
        raise UserError(f"{path} is cut short in its field table; {AGAIN}")
    table = np.fromfile(path, FIELD, fields, offset=HEADER.itemsize)
    names = [bytes(row["name"]).split(b"\0")[0].decode("ascii", "replace") for row in table]
    if table["type"].tolist() != [RGB_IMAGE, INTEGER]:
        kinds = [
            f"{n} ({FIELD_TYPES.get(int(t), 'custom')})" for n, t in zip(names, table["type"], strict=True)
        ]
        raise UserError(
            f"{path} has the fields {', '.join(kinds) or 'none'}; expected image (rgb_image), label (int) in "
            "this order: convert it, or write it with `arat-fast data prepare`"
        )
    return (names[0], names[1]), bytes(table[1]["arguments"])


def _description(arguments: bytes) -> dict[str, Any]:
    try:
        value = json.loads(arguments.split(b"\0")[0] or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sizes(
    path: Path,
    records: NDArray[np.void],
    allocations: NDArray[np.void],
    begin: int,
    end: int,
) -> NDArray[np.uint64]:
    """Bytes of each image, from the allocation table, when that and the records agree in everything."""
    count, image = len(records), records["f0"]
    samples, places, sizes = (allocations[name] for name in ("sample", "place", "size"))
    damaged = UserError(f"{path} is damaged: its allocation table and its records do not agree; {AGAIN}")
    if (samples >= count).any() or (np.bincount(samples.astype(np.int64), minlength=count) != 1).any():
        raise damaged
    # uint64 sums could wrap: bound both parts first.
    if (places < begin).any() or (places > end).any() or (sizes == 0).any() or (sizes > end).any():
        raise damaged
    order = np.argsort(places)
    ends = places[order] + sizes[order]
    if (ends > np.append(places[order][1:], np.uint64(end))).any():
        raise damaged
    by_sample = np.empty(count, np.uint64)
    by_sample[samples.astype(np.int64)] = sizes
    place_of = np.empty(count, np.uint64)
    place_of[samples.astype(np.int64)] = places
    pixels = image["width"].astype(np.uint64) * image["height"].astype(np.uint64)
    raw = image["mode"] == RAW
    if (
        (place_of != image["place"]).any()
        or (image["mode"] > RAW).any()
        or (pixels == 0).any()
        or (by_sample[raw] != 3 * pixels[raw]).any()
    ):
        raise damaged
    return by_sample
