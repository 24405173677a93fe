"""The familiar way: a torch DataLoader over Pillow images. The baseline, and what works everywhere.

`TorchvisionStream` feeds the trainer: uint8 batches, whose crops and flips are the trainer's as with every
loader. `familiar_pipeline` is the pipeline of most published code, random crop, flip and ToTensor in the
workers, to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arat_fast.errors import UserError
from arat_fast.loaders.crops import ResizedCrop, crop_and_resize
from arat_fast.loaders.images import ImageSource
from arat_fast.loaders.stream import WHOLE, Batch, Shard, epoch_order


def cropped_photos(
    source: ImageSource, indices: Sequence[int], *, side: int, seed: int, epoch: int
) -> NDArray[np.uint8]:
    """Hashed random resized crops of photos, uint8 (N, side, side, 3)."""
    photos = [Image.fromarray(source.image(index)) for index in indices]
    heights = np.array([photo.height for photo in photos], np.int64)
    widths = np.array([photo.width for photo in photos], np.int64)
    boxes = ResizedCrop(side).boxes(np.asarray(indices, np.int64), heights, widths, seed=seed, epoch=epoch)
    return np.stack([crop_and_resize(p, tuple(b), side) for p, b in zip(photos, boxes.tolist(), strict=True)])


class _EpochDataset(Dataset[Tensor]):
    """A batch at a time: DataLoader calls `__getitems__` with a batch's indices where there is one."""

    def __init__(self, source: ImageSource, seed: int, epoch: int) -> None:
        self.source, self.seed, self.epoch = source, seed, epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> Tensor | str:
        try:
            if self.source.is_photos:
                side = self.source.image_shape[0]
                images = cropped_photos(self.source, indices, side=side, seed=self.seed, epoch=self.epoch)
            else:
                images = self.source.images_at(indices)
        except UserError as error:  # as a value: a worker's exception arrives wrapped in its traceback
            return str(error)
        return torch.from_numpy(images)


def _as_it_is(batch: Any) -> Any:
    return batch


class TorchvisionStream:
    """Shuffled batches through torch's DataLoader, decoded by Pillow in `workers` processes (0: in this one).

    The last, smaller batch is kept. Raises UserError while reading for an image that is damaged, or when a
    worker dies.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int = 0,
        shard: Shard = WHOLE,
    ) -> None:
        self.source, self.batch_size, self.seed, self.device = source, batch_size, seed, device
        self.workers, self.shard = workers, shard
        self.labels = torch.from_numpy(source.labels).to(device)

    def __len__(self) -> int:
        return self.shard.batches(len(self.source), self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        order = self.shard.part(epoch_order(len(self.source), self.seed, epoch)).contiguous()
        parts = order.split(self.batch_size)[first_batch:]
        loader = DataLoader(
            _EpochDataset(self.source, self.seed, epoch),
            batch_sampler=[part.tolist() for part in parts],
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            # The loader draws a base seed from torch's global generator; give it one of its own.
            generator=torch.Generator(),
        )
        try:
            for part, images in zip(parts, loader, strict=True):
                if isinstance(images, str):
                    raise UserError(images)
                indices = part.to(self.device, non_blocking=True)
                yield Batch(
                    images.to(self.device, non_blocking=True).contiguous(), self.labels[indices], indices
                )
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise UserError(
                f"a loader process died ({str(error).splitlines()[0]}): too little memory or shared "
                "memory? Use fewer --workers, or 0"
            ) from None


class _PillowImages(Dataset[tuple[Tensor, int]]):
    """As torchvision.datasets.CIFAR10: one Pillow image at a time through the transforms."""

    def __init__(self, source: ImageSource, transform: object) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.source.image(index)
        photo = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        assert callable(self.transform)
        return self.transform(photo), int(self.source.labels[index])


def familiar_pipeline(
    source: ImageSource, *, batch_size: int, workers: int, padding: int = 4
) -> DataLoader[tuple[Tensor, int]]:
    """The usual training loader: shuffled, augmented fp32 (N, C, H, W) batches in [0, 1] and labels.

    RandomCrop and flip for images of one size, RandomResizedCrop and flip for photos; torch's global
    generators decide.
    """
    from arat_fast.loaders.torchvision_import import torchvision

    transforms = torchvision.transforms
    side = source.image_shape[0]
    crop = (
        transforms.RandomResizedCrop(side)
        if source.is_photos
        else transforms.RandomCrop(side, padding=padding)
    )
    chain = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    return DataLoader(
        _PillowImages(source, chain), batch_size, shuffle=True, num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
