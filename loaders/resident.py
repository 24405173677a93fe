"""The whole data set as uint8 on the training device: nothing is left to load.

CIFAR-10 is 154 MB. An epoch copies its order (8 bytes an image) to the device; a batch is a slice of it,
and the augmentation kernel gathers the images in the pass that crops and flips them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from arat_fast.loaders.images import ImageSource
from arat_fast.loaders.stream import WHOLE, Batch, Shard, epoch_order


class ResidentStream:
    """Shuffled batches of a data set that lies on the device; the last, smaller batch is kept.

    The images of a batch are the whole store, (M, H, W, C), with `resident` set. A data set on disk is read
    once, here.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        shard: Shard = WHOLE,
    ) -> None:
        self.batch_size, self.seed, self.device, self.shard = batch_size, seed, device, shard
        images = source.in_memory()
        self.images = torch.from_numpy(images.images).to(device).contiguous()
        self.labels = torch.from_numpy(images.labels).to(device)

    def __len__(self) -> int:
        return self.shard.batches(len(self.labels), self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        order = self.shard.part(epoch_order(len(self.labels), self.seed, epoch))
        if self.device.type == "cuda":
            order = order.pin_memory()
        rows = order.contiguous().to(self.device, non_blocking=True)
        labels = self.labels[rows]
        for begin in range(first_batch * self.batch_size, len(rows), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            yield Batch(self.images, labels[part], rows[part], resident=True)


def resident_bytes(source: ImageSource) -> int:
    """Device memory that the store of a data set takes, in bytes."""
    height, width, channels = source.image_shape
    return len(source) * height * width * channels
