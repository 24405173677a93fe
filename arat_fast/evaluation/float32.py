"""The arithmetic of an evaluation on a GPU: float32 in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32(benchmark: bool) -> Iterator[None]:
    """Compute what is inside, or in a function decorated with this, in full float32; then as before.

    PyTorch lets cuDNN's convolutions run as TF32, with 10 bits of mantissa, unless told otherwise.
    benchmark: let cuDNN look for each convolution's fastest algorithm, which pays where shapes stay the same.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = _allows_tf32(cudnn, cudnn.conv), _allows_tf32(matmul, matmul), cudnn.benchmark  # type: ignore[attr-defined]
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, benchmark
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def _allows_tf32(flags: Any, newer: Any) -> bool:
    """The flag; where a program has set the newer fp32_precision, reading it may raise."""
    try:
        return bool(flags.allow_tf32)
    except RuntimeError:
        return bool(newer.fp32_precision == "tf32")
