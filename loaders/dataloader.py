"""The plain stream: a torch DataLoader over images in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, TensorDataset

from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.stream import Batch, epoch_order


class DataLoaderStream:
    """Shuffled batches of an ImageSet through torch's DataLoader; the last, smaller batch is kept."""

    def __init__(
        self, images: ImageSet, *, batch_size: int, seed: int, device: torch.device, workers: int = 0
    ) -> None:
        self.batch_size, self.seed, self.device, self.workers = batch_size, seed, device, workers
        self.dataset = TensorDataset(
            torch.from_numpy(images.images), torch.from_numpy(images.labels), torch.arange(len(images))
        )

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        order = epoch_order(len(self.dataset), self.seed, epoch)
        batches = [b.tolist() for b in order.split(self.batch_size)][first_batch:]
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # The loader draws a base seed from torch's global generator; give it one of its own.
            generator=torch.Generator(),
        )
        for tensors in loader:
            yield Batch(*(t.to(self.device, non_blocking=True) for t in tensors))
