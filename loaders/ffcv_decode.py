"""Numba loops that read images of a memory-mapped `.beton` into a batch: raw, JPEG, cropped and resized.

They call FFCV's C functions by name, so that Numba can keep the machine code on disk (a ctypes pointer, as
FFCV has it, cannot be kept): 0.1 s instead of 5 to 12 s in every process. They run outside the
interpreter's lock; threads of one pool share a batch. libjpeg-turbo's handles live as long as their thread,
so the pool lives as long as the process.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import llvmlite.binding  # type: ignore
import numpy as np
from numba import njit, types
from numpy.typing import NDArray

GOOD, BAD_JPEG, WRONG_SIZE = 0, 1, 2

_imdecode: Any = types.ExternalFunction(
    "arat_fast_ffcv_imdecode",
    types.int32(
        types.uintp, types.uint64, types.uint32, types.uint32, types.uintp, types.uint32, types.uint32,
        types.uint32, types.uint32, types.uint32, types.uint32, types.uint32, types.uint32,
    ),
)  # fmt: skip
_resize: Any = types.ExternalFunction("arat_fast_ffcv_resize", types.void(*[types.int64] * 11))


def bind(library: Any) -> None:
    """Let compiled code find FFCV's functions; before its first call."""
    for name in ("imdecode", "resize"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"arat_fast_ffcv_{name}", address)


@cache
def decode_pool(workers: int) -> ThreadPoolExecutor:
    """The process's threads that decode, by their number."""
    return ThreadPoolExecutor(workers, thread_name_prefix="arat-fast-decode")


def in_parts(work: Callable[[slice], None], count: int, workers: int) -> None:
    """Run `work` on `workers` parts of range(count) at once; an exception of any is raised here."""
    step = -(-count // workers)
    parts = [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]
    for done in [decode_pool(workers).submit(work, part) for part in parts]:
        done.result()


@njit(nogil=True, cache=True)
def jpeg_has_size(data: Any, height: int, width: int) -> bool:
    """Whether a JPEG's frame header says (height, width) and three components.

    The decoder trusts its caller: a smaller picture would leave the rest of the batch as it was.
    """
    size = len(data)
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    at = 2
    while at + 9 < size:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            found_height = data[at + 5] * 256 + data[at + 6]
            found_width = data[at + 7] * 256 + data[at + 8]
            return found_height == height and found_width == width and data[at + 9] == 3
        at += 2 + data[at + 2] * 256 + data[at + 3]
    return False


@njit(nogil=True, cache=True)
def _decode_jpeg(data: Any, height: int, width: int, target: Any) -> int:
    if not jpeg_has_size(data, height, width):
        return WRONG_SIZE
    failed = _imdecode(
        data.ctypes.data, len(data), height, width, target.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
    )
    return BAD_JPEG if failed != 0 else GOOD


@njit(nogil=True, cache=True)
def read_images(
    data: Any, places: Any, sizes: Any, modes: Any, rows: Any, height: int, width: int, out: Any, status: Any
) -> None:
    """Images of one size to out, uint8 (N, H·W·3); status (N,): what became of each."""
    for k in range(len(rows)):
        row = rows[k]
        begin = np.int64(places[row])
        stored = data[begin : begin + np.int64(sizes[row])]
        if modes[row] == 0:
            status[k] = _decode_jpeg(stored, height, width, out[k])
        else:
            out[k, :] = stored
            status[k] = 0


@njit(nogil=True, cache=True)
def read_crops(
    data: Any,
    places: Any,
    sizes: Any,
    modes: Any,
    heights: Any,
    widths: Any,
    rows: Any,
    boxes: Any,
    scratch: Any,
    out: Any,
    status: Any,
) -> None:
    """Crops of images of any size, resized by OpenCV's area filter to out, uint8 (N, side, side, 3).

    boxes: int64 (N, 4), top, left, height, width; scratch: uint8, of the largest image's bytes.
    """
    side = out.shape[1]
    for k in range(len(rows)):
        row = rows[k]
        begin = np.int64(places[row])
        stored = data[begin : begin + np.int64(sizes[row])]
        height, width = heights[row], widths[row]
        source = stored.ctypes.data
        status[k] = 0
        if modes[row] == 0:
            status[k] = _decode_jpeg(stored, height, width, scratch)
            source = scratch.ctypes.data
        if status[k] == 0:
            top, left = boxes[k, 0], boxes[k, 1]
            bottom, right = top + boxes[k, 2], left + boxes[k, 3]
            _resize(0, source, height, width, top, bottom, left, right, out[k].ctypes.data, side, side)


def first_bad(status: NDArray[np.int32]) -> tuple[int, str] | None:
    """(place in the batch, what is wrong) of the first image that could not be read, if there is one."""
    bad = np.flatnonzero(status)
    if len(bad) == 0:
        return None
    reasons = {BAD_JPEG: "its JPEG data is damaged", WRONG_SIZE: "it is no RGB JPEG of the recorded size"}
    return int(bad[0]), reasons[int(status[bad[0]])]
