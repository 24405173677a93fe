"""Batches of an epoch: which images, in which order, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """images: uint8 (N, H, W, C); labels: int64 (N,); indices: int64 (N,), each sample's place in the data
    set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Stream(Protocol):
    """An epoch's batches, on the training device. Augmentation is the trainer's, hashed from `indices`."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        ...


def counter_seed(*counters: int) -> int:
    """A 63-bit seed mixed from the counters: (seed, epoch), (seed, step)… each give an unrelated one."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` samples in `epoch`: a function of its arguments alone."""
    generator = torch.Generator().manual_seed(counter_seed(seed, epoch))
    return torch.randperm(count, generator=generator)
