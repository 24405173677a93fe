"""Batches of a `.beton` file through FFCV: decoded, cropped and sent to the device ahead of the trainer.

For data that does not fit the device's memory. FFCV reads, decodes and prefetches; which images, in which
order, and with which crop is decided here as for every other loader, so that it is reproducible and resumes
exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from arat_fast.errors import UserError
from arat_fast.loaders.beton import AGAIN
from arat_fast.loaders.beton_set import BetonSet
from arat_fast.loaders.crops import ResizedCrop
from arat_fast.loaders.ffcv_runtime import Runtime, runtime
from arat_fast.loaders.stream import WHOLE, Batch, Shard, counter_seed, epoch_order

Order = Literal["random", "pages", "sequential"]
PAGES_TOGETHER = 64  # half a gigabyte of 8 MiB pages


def page_order(places: NDArray[np.uint64], page_size: int, seed: int, epoch: int) -> torch.Tensor:
    """An order that stays within PAGES_TOGETHER pages for a while: for files that memory cannot hold.

    Pages are shuffled, then the images of each group of pages. FFCV's QUASI_RANDOM is the same in spirit but
    shuffles in place, so that an epoch depends on the ones before it.
    """
    page_of = (places // np.uint64(page_size)).astype(np.int64)
    generator = np.random.Generator(np.random.Philox(counter_seed(seed, epoch)))
    pages, page_of = np.unique(page_of, return_inverse=True)
    group = generator.permutation(len(pages))[page_of] // PAGES_TOGETHER
    order = np.lexsort((generator.permutation(len(places)), group))
    return torch.from_numpy(order)


class FFCVStream:
    """Batches of a BetonSet; the last, smaller batch is kept.

    workers: threads that decode; 0 counts as 1. order: random (every permutation alike), pages (neighbours on
    disk stay near each other), or sequential.

    Raises UserError where FFCV is missing, or while reading for an image that is damaged.
    """

    def __init__(
        self,
        source: BetonSet,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int = 0,
        order: Order = "random",
        shard: Shard = WHOLE,
    ) -> None:
        self.source, self.batch_size, self.seed, self.device = source, batch_size, seed, device
        self.workers, self.order, self.shard = max(1, workers), order, shard
        self._ffcv: Runtime = runtime()
        self.labels = torch.from_numpy(source.labels).to(device)
        self._data = np.memmap(source.file.path, np.uint8, "r").view(np.ndarray)

    def __len__(self) -> int:
        return self.shard.batches(len(self.source), self.batch_size)

    def indices(self, epoch: int) -> torch.Tensor:
        """This shard's samples in the order of `epoch`, int64 on the CPU."""
        count = len(self.source)
        if self.order == "random":
            order = epoch_order(count, self.seed, epoch)
        elif self.order == "pages":
            places = self.source.file.places[self.source.rows]
            order = page_order(places, self.source.file.page_size, self.seed, epoch)
        else:
            order = torch.arange(count)
        return self.shard.part(order).contiguous()

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        indices = self.indices(epoch)[first_batch * self.batch_size :]
        if len(indices) == 0:
            return
        decoder = self._decoder(indices.numpy(), epoch)
        operations = self._ffcv.pipeline(decoder, self.device)
        loader = self._ffcv.loader(self.source.file, self.batch_size, self.workers, operations)
        on_device = indices.to(self.device)
        # FFCV is given places in the epoch, and the decoder looks up what belongs there.
        prefetcher = loader.batches(np.arange(len(indices)))
        try:
            for begin, (images,) in zip(range(0, len(indices), self.batch_size), prefetcher, strict=True):
                part = on_device[begin : begin + self.batch_size]
                # A copy: the buffer is one of a ring and is filled again while the batch is in use.
                yield Batch(images.clone(), self.labels[part], part)
        finally:
            prefetcher.close()

    def _decoder(self, indices: NDArray[np.int64], epoch: int) -> Any:
        from arat_fast.loaders import ffcv_decode

        ffcv_decode.bind(self._ffcv.library)
        source, file = self.source, self.source.file
        height, width, _ = source.image_shape
        shape = (height, width, 3)
        crop = ResizedCrop(source.side) if source.side else None
        # A thread decodes into a buffer of its own; FFCV has one for each image of each batch in its ring.
        own, largest = threading.local(), int((file.heights * file.widths).max()) * 3

        def decode(places: NDArray[np.int64], out: NDArray[np.uint8]) -> Any:
            samples = indices[places]
            rows = source.rows[samples]
            status = np.zeros(len(rows), np.int32)
            boxes = np.empty((0, 4), np.int64)
            if crop is not None:
                boxes = crop.boxes(
                    samples, file.heights[rows], file.widths[rows], seed=self.seed, epoch=epoch
                )

            def work(part: slice) -> None:
                stored = (self._data, file.places, file.sizes, file.modes)
                if crop is None:
                    flat = out.reshape(len(out), -1)
                    ffcv_decode.read_images(*stored, rows[part], height, width, flat[part], status[part])
                else:
                    sizes, scratch = (file.heights, file.widths), getattr(own, "scratch", None)
                    if scratch is None:
                        scratch = own.scratch = np.empty(largest, np.uint8)
                    ffcv_decode.read_crops(
                        *stored, *sizes, rows[part], boxes[part], scratch, out[part], status[part]
                    )

            ffcv_decode.in_parts(work, len(rows), self.workers)
            bad = ffcv_decode.first_bad(status)
            if bad is not None:
                raise UserError(f"the image {rows[bad[0]]} of {file.path} is damaged: {bad[1]}; {AGAIN}")
            return out[: len(rows)]

        return self._ffcv.decoder(decode, shape)
