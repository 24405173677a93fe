"""Batches of an epoch: which images, in which order, resumable anywhere.

Order and shards are functions of (count, seed, epoch, rank, world size) alone, drawn here for every loader,
so that loader, worker count and restart change nothing. Crops and flips are the trainer's, hashed from the
indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch on the training device.

    images: uint8 (N, H, W, C), contiguous; with `resident` the whole data set (M, H, W, C), from which the
    augmentation gathers the rows `indices`. labels: int64 (N,). indices: int64 (N,), each sample's place in
    the data set, which is what its crop and flip are hashed from.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    resident: bool = False


class Stream(Protocol):
    """An epoch's batches, on the training device."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        ...


class Shard(NamedTuple):
    """Which part of every epoch this process reads: part `rank` of `world_size`.

    Parts are disjoint and of equal size, so all ranks make the same number of steps. What is left over when
    world_size does not divide the data set (fewer than world_size images, others every epoch) is not read;
    with one process every image is read once an epoch.
    """

    rank: int = 0
    world_size: int = 1

    def size(self, count: int) -> int:
        """Images of this part, of `count` in all. Raises ValueError for a rank outside the world, or an
        empty part.
        """
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; expected 0 to world_size - 1 = {self.world_size - 1}")
        if count < self.world_size:
            raise ValueError(f"{count} images cannot be shared by {self.world_size} processes")
        return count // self.world_size

    def batches(self, count: int, batch_size: int) -> int:
        """Batches an epoch; the last, smaller one counts."""
        return -(-self.size(count) // batch_size)

    def part(self, order: Tensor) -> Tensor:
        """This part of an epoch's order, (count,) to (count // world_size,)."""
        return order[self.rank :: self.world_size][: self.size(len(order))]


WHOLE = Shard()


def counter_seed(*counters: int) -> int:
    """A 63-bit seed mixed from the counters: (seed, epoch), (seed, step)… each give an unrelated one."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` samples in `epoch`: a function of its arguments alone.

    int64 (count,) on the CPU, whatever the device: a GPU's generator would give another order. 50,000 take
    0.6 ms an epoch.
    """
    generator = torch.Generator().manual_seed(counter_seed(seed, epoch))
    return torch.randperm(count, generator=generator)
