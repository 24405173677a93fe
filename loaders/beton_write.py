"""Write `.beton` files, byte for byte as FFCV's own writer with one process would place them, without it.

FFCV's DatasetWriter waits for ever when a worker dies, leaves half a file, and with two processes writes
another file every time. Here threads encode and one places: the same bytes whatever the number of threads.
The file gets its name when it is complete, and a checksum beside it.

Photos that are RGB JPEG files already and need no resizing are stored as they are: no second loss, no work.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from arat_fast.errors import UserError
from arat_fast.kernels.philox import philox4x32
from arat_fast.loaders.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE,
    INTEGER,
    JPEG,
    RAW,
    RECORD,
    RGB_IMAGE,
    VERSION,
    checksum_path,
    file_digest,
)  # fmt: skip
from arat_fast.loaders.images import ImageSource
from arat_fast.loaders.photos import PhotoSet

PAGE = 4 << 21  # FFCV's default; no image may be larger
Mode = Literal["raw", "jpeg", "mixed"]


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    mode: raw pixels (exact), JPEG, or mixed: `raw_share` of the photos raw, chosen by a hash of their number,
    which trades disk for decoding time. quality: of JPEG, where encoding is needed. longest_side: larger
    photos are shrunk to it, in pixels; 0: none are.
    """

    mode: Mode = "raw"
    quality: int = 95
    raw_share: float = 0.5
    longest_side: int = 0

    def is_raw(self, index: int) -> bool:
        """Whether image `index` is stored raw."""
        if self.mode != "mixed":
            return self.mode == "raw"
        key, zero = np.array([0x424554]), np.zeros(1, np.int64)
        return int(philox4x32(key, zero + index, zero, zero, zero)[0][0]) < self.raw_share * 2**32


@dataclass(frozen=True)
class _Encoded:
    mode: int
    width: int
    height: int
    data: bytes


def write_beton(
    source: ImageSource,
    path: Path,
    *,
    encoding: Encoding = Encoding(),
    description: dict[str, Any] | None = None,
    workers: int = 1,
    progress: Callable[[int], object] = lambda images: None,
) -> None:
    """Write a data set, and its checksum beside it; `progress` is told of every image written.

    description: short JSON values that are kept in the file (its label field's 1,024 bytes for arguments,
    which FFCV does not use); num_classes is always there.

    Raises UserError for grey images, damaged photos, one larger than 8 MiB, or a disk that is full or not
    writable; nothing is left behind, and a file that was there before stays.
    """
    if source.image_shape[2] != 3:
        raise UserError(
            f"{source.source} has {source.image_shape[2]} channel(s); .beton files hold RGB images. "
            "Small grey data fits the device: use --loader resident"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _write(file, source, encoding, description or {}, workers, progress)
            file.flush()
            os.fsync(file.fileno())
        line = f"{file_digest(partial)}  {path.name}\n"
        # A file without a checksum is accepted, one with another's is not: so this order, should it be cut.
        checksum_path(path).unlink(missing_ok=True)
        partial.replace(path)
        checksum_path(path).write_text(line)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = (
            "free some space or choose another --out" if full else "check the folder, or choose another --out"
        )
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _write(
    file: BinaryIO,
    source: ImageSource,
    encoding: Encoding,
    description: dict[str, Any],
    workers: int,
    progress: Callable[[int], object],
) -> None:
    count = len(source)
    header = np.zeros(1, HEADER)
    fields = _field_table({"num_classes": source.num_classes, **description})
    records = np.zeros(count, RECORD)
    records["f1"] = source.labels
    allocations = np.zeros(count, ALLOCATION)
    for part in (header, fields, records):  # room for them; header and records are known at the end
        file.write(part.tobytes())
    _pad(file)
    left = PAGE
    for index, image in enumerate(_encoded(source, encoding, workers)):
        size = len(image.data)
        if size > PAGE:
            raise UserError(
                f"image {index} of {source.source} takes {size:,} bytes, more than a page of {PAGE:,}: "
                "store JPEG, or shrink photos with --longest-side"
            )
        if size > left:
            _pad(file)
            left = PAGE
        place = file.tell()
        file.write(image.data)
        left -= size
        records["f0"][index] = (image.mode, image.width, image.height, place)
        allocations[index] = (index, place, size)
        progress(1)
    _pad(file)
    table = file.tell()
    file.write(allocations.tobytes())
    file.seek(HEADER.itemsize + fields.nbytes)
    file.write(records.tobytes())
    header[0] = (VERSION, len(fields), PAGE, count, table)
    file.seek(0)
    file.write(header.tobytes())


def _pad(file: BinaryIO) -> None:
    """Zeros up to the next page."""
    file.write(bytes(-file.tell() % PAGE))


def _field_table(description: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.void]]:
    fields = np.zeros(2, FIELD)
    text = json.dumps(description, separators=(",", ":")).encode()
    room = fields["arguments"].shape[1]
    if len(text) >= room:
        raise ValueError(f"the description takes {len(text)} bytes; expected fewer than {room}")
    for row, (kind, name) in zip(fields, ((RGB_IMAGE, b"image"), (INTEGER, b"label")), strict=True):
        row["type"] = kind
        row["name"][: len(name)] = np.frombuffer(name, np.uint8)
    fields[1]["arguments"][: len(text)] = np.frombuffer(text, np.uint8)
    return fields


def _encoded(source: ImageSource, encoding: Encoding, workers: int) -> Iterator[_Encoded]:
    """Images in order, encoded by threads a window ahead; Pillow works outside the interpreter's lock."""

    def encode(index: int) -> _Encoded:
        return _encode(source, index, encoding)

    if workers <= 1:
        yield from map(encode, range(len(source)))
        return
    window = 64 * workers  # images in memory at a time
    with ThreadPoolExecutor(workers) as pool:
        for begin in range(0, len(source), window):
            yield from pool.map(encode, range(begin, min(begin + window, len(source))))


def _encode(source: ImageSource, index: int, encoding: Encoding) -> _Encoded:
    raw, limit = encoding.is_raw(index), encoding.longest_side
    photo = Image.fromarray(source.image(index))  # decoded in every case: a damaged file is found now
    small = not limit or max(photo.size) <= limit
    if not raw and small and isinstance(source, PhotoSet):
        data = source.paths[index].read_bytes()
        if is_plain_jpeg(data, photo.size):
            return _Encoded(JPEG, *photo.size, data)
    if not small:
        share = limit / max(photo.size)
        size = (max(1, round(photo.width * share)), max(1, round(photo.height * share)))
        photo = photo.resize(size, Image.Resampling.BOX)
    if raw:
        return _Encoded(RAW, *photo.size, np.asarray(photo).tobytes())
    buffer = BytesIO()
    photo.save(buffer, "JPEG", quality=encoding.quality)
    return _Encoded(JPEG, *photo.size, buffer.getvalue())


def is_plain_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether a decoder of RGB JPEG reads `data` as an image of `size`: not grey, CMYK or another format."""
    with Image.open(BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and image.size == size


assert IMAGE.itemsize == 13  # packed, as FFCV's; RECORD is 24 bytes
