"""A user's network and batches in a training run: `Trainer(config, run_dir=…, model=…, loaders=…)`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arat_fast import methods
from arat_fast.attacks.checks import span
from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.loaders.stream import Batch, counter_seed
from arat_fast.nn import SplitBatchNorm2d, bind_branches, convert_split_bn

Loader = Iterable[tuple[Tensor, Tensor]]


def adopt(
    config: TrainConfig, model: nn.Module, channels: int, num_classes: int
) -> tuple[nn.Module, methods.Method]:
    """The user's network, with the method's BatchNorm branches and channels-last, and the method.

    Plain BatchNorm2d is split in place; split BN must have the method's branches. Raises ValueError where it
    cannot be, UserError for a layer to tap that is missing.
    """
    if config.arrest.teacher is not None:
        raise UserError("arrest takes its teacher's network; it cannot train another model")
    branches = methods.branches_of(config)
    if any(isinstance(layer, SplitBatchNorm2d) for layer in model.modules()):
        bind_branches(model)
    elif any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        model = convert_split_bn(model, branches)
    elif len(branches) > 1:
        raise ValueError(
            f"{config.method} splits BatchNorm by branch, and {type(model).__name__} has none; choose "
            "another method, or arat.split_bn = False"
        )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        return model, methods.create_method(config, model, num_classes, channels)


@dataclass(frozen=True)
class OwnData:
    """What a run knows of a user's batches."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    count: int
    batch_size: int  # of the first batch

    def __len__(self) -> int:
        return self.count


class LoaderStream:
    """A user's DataLoader as a stream: float images (N, C, H, W) in [0, 1] and int64 labels.

    Each epoch starts from a seed of its own, so that a loader that shuffles by torch's generator, or one that
    it was given, gives the same batches after a restart, for as long as it draws nothing else from it.
    """

    def __init__(self, loader: Loader, seed: int, device: torch.device, num_classes: int) -> None:
        if not isinstance(loader, Sized):
            raise UserError(
                "loaders: the training loader has no length; give a DataLoader of a sized data set"
            )
        self.loader, self.seed, self.device, self.num_classes = loader, seed, device, num_classes
        self._length = len(loader)

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1), the first `first_batch` of them skipped."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counter_seed(self.seed, epoch))
            set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            for generator in _generators(self.loader):
                generator.manual_seed(counter_seed(self.seed, epoch))
            batches = iter(self.loader)
            head = list(itertools.islice(batches, 1))  # a sampler shuffles when it is first asked
        for images, labels in itertools.islice(itertools.chain(head, batches), first_batch, None):
            check_batch(images, labels)
            if not labels.is_cuda:  # on the host the look costs nothing
                check_range(labels, self.num_classes)
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                torch.empty(0, dtype=torch.int64),
            )


def _generators(loader: object) -> list[torch.Generator]:
    """Those that a DataLoader and its sampler were given."""
    sampler = getattr(loader, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (loader, sampler)]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def check_batch(images: object, labels: object) -> None:
    """Raise UserError unless the two are float32 images (N, C, H, W) and int64 labels (N,)."""
    if not (isinstance(images, Tensor) and images.dtype is torch.float32 and images.ndim == 4):
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"loaders: images are {got}; expected float32 (N, C, H, W) in [0, 1]")
    if not (isinstance(labels, Tensor) and labels.dtype is torch.int64 and labels.shape == images.shape[:1]):
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise UserError(f"loaders: labels are {got}; expected int64 ({len(images)},)")


def check_range(labels: Tensor, num_classes: int) -> None:
    """Raise UserError unless the labels are in [0, num_classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"loaders: labels run from {low} to {high}; the model has classes 0 to {num_classes - 1}"
        )


def look_at(loader: Loader, model: nn.Module) -> OwnData:
    """Shapes of a user's first batch, and the classes of the model on it.

    Raises UserError for an empty loader, wrong tensors, pixels outside [0, 1], or a model whose output is not
    logits.
    """
    if not isinstance(loader, Sized):
        raise UserError("loaders: the training loader has no length; give a sized DataLoader")
    first = next(iter(loader), None)
    if first is None:
        raise UserError("loaders: the training loader is empty")
    images, labels = first
    check_batch(images, labels)
    low, high = float(images.amin()), float(images.amax())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"loaders: pixels span {span(low, high)}; expected [0, 1]. Normalise inside the model, where the "
            "attack sees it"
        )
    was_training = model.training
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model.eval()(images[:2].to(device).contiguous(memory_format=torch.channels_last))
    model.train(was_training)
    if not isinstance(logits, Tensor):
        raise UserError(f"the model returned a {type(logits).__name__}; expected logits (N, classes)")
    if logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
        raise UserError(
            f"the model's output is {tuple(logits.shape)} and labels reach {int(labels.max())}; expected (N, "
            "classes) with more classes than the largest label"
        )
    _, channels, height, width = images.shape
    dataset = getattr(loader, "dataset", None)
    count = len(dataset) if isinstance(dataset, Sized) else len(loader) * len(images)
    return OwnData((height, width, channels), logits.shape[1], count, len(images))
