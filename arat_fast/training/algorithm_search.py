"""When cuDNN looks for each convolution's fastest algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def algorithm_search(pays: bool) -> Iterator[None]:
    """Where it does not pay, keep cuDNN from looking for each convolution's fastest algorithm.

    An epoch's last, smaller batch is one of hundreds, and the search takes as long for it as for the others.
    """
    if pays or not torch.backends.cudnn.benchmark:
        yield
        return
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = True
