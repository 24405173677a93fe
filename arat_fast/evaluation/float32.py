"""The arithmetic of an evaluation on a GPU: float32 in full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CUDNN: Any = torch.backends.cudnn  # conv and rnn are not in its annotations
_MATMUL: Any = torch.backends.cuda.matmul


@contextlib.contextmanager
def full_float32(benchmark: bool) -> Iterator[None]:
    """Compute what is inside, or in a function decorated with this, in full float32; then as before.

    PyTorch lets cuDNN's convolutions run as TF32, with 10 bits of mantissa, unless told otherwise.
    benchmark: let cuDNN look for each convolution's fastest algorithm, which pays where shapes stay the same.
    """
    # PyTorch keeps an older and a newer setting of the same thing: where a program has set the newer one, the
    # older may not be readable, and what is put back must be what was set.
    matmul = _readable(torch.get_float32_matmul_precision)
    allows = _readable(lambda: _CUDNN.allow_tf32)
    newer = _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision, _MATMUL.fp32_precision
    before = _CUDNN.benchmark
    _CUDNN.allow_tf32, _MATMUL.allow_tf32, _CUDNN.benchmark = False, False, benchmark
    inherits = _CUDNN.conv.fp32_precision == "tf32"  # from cuDNN's or PyTorch's own fp32_precision
    if inherits:
        _CUDNN.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        _CUDNN.benchmark = before
        if allows is not None:
            _CUDNN.allow_tf32 = allows
        if allows is None or inherits:
            _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision = newer[:2]
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        else:
            _MATMUL.fp32_precision = newer[2]


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None
