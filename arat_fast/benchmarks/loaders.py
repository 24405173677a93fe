"""Images/s of each loader alone: the same images, all ending in the same augmented float batch on the
device.

    arat-fast bench loaders [--json FILE]

The loaders take turns, an epoch at a time, and the median epoch counts; ratios are to `torchvision`, the
usual DataLoader with Pillow images, RandomCrop, flip and ToTensor in two processes. torch has one thread on
a CPU, so that a loader is measured and not the conversion's threads. Before it is timed, each loader is
checked to yield the right images.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from arat_fast.commands.table import format_table
from arat_fast.environment import environment
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.kernels.augment import random_crop_flip
from arat_fast.loaders import sources
from arat_fast.loaders.beton_set import load_beton
from arat_fast.loaders.beton_write import write_beton
from arat_fast.loaders.choose import LoaderName, open_stream
from arat_fast.loaders.ffcv_runtime import why_not
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.stream import Batch, Stream
from arat_fast.loaders.torchvision import familiar_pipeline
from arat_fast.training.build import pick_device

SEED, PADDING = 0, 4
BASELINE = "torchvision"


@dataclass(frozen=True)
class LoaderOptions:
    """Measure each loader alone, in images/s: crop, flip and conversion to fp32 included, no training."""

    dataset: str = "synthetic"
    """synthetic: random bytes; or a data set of one image size, such as cifar10."""
    data_root: str | None = None
    """Folder of the data set."""
    images: int = 50_000
    """Images an epoch; 0: all of the data set."""
    side: int = 32
    """Side of synthetic images, in pixels."""
    batch_size: int = 512
    """Images a batch."""
    repeats: int = 3
    """Timed epochs of each loader; the median counts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where batches end."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""


Epoch = Callable[[int], Iterator[Tensor]]  # of an epoch's number: its float batches, on the device


def synthetic_images(options: LoaderOptions) -> ImageSet:
    """Random bytes of the asked number and size."""
    generator = np.random.default_rng(SEED)
    shape = (options.images or 50_000, options.side, options.side, 3)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    return ImageSet(images, generator.integers(0, 10, len(images)), 10, "random bytes")


def _images(options: LoaderOptions) -> ImageSet:
    if options.dataset == "synthetic":
        return synthetic_images(options)
    train, _ = sources.load(options.dataset, options.data_root)
    if train.is_photos:
        raise UserError(f"bench loaders measures images of one size; {options.dataset} holds photos")
    return train.first(options.images).in_memory()


def augmented(batch: Batch, epoch: int) -> Tensor:
    """The float batch that a training step starts from."""
    return random_crop_flip(
        batch.images, batch.indices, seed=SEED, epoch=epoch, padding=PADDING, resident=batch.resident
    )


def _of_stream(stream: Stream) -> Epoch:
    return lambda epoch: (augmented(batch, epoch) for batch in stream.epoch(epoch))


def _familiar(images: ImageSource, workers: int, options: LoaderOptions, device: torch.device) -> Epoch:
    loader = familiar_pipeline(images, batch_size=options.batch_size, workers=workers, padding=PADDING)
    return lambda epoch: (batch.to(device, non_blocking=True) for batch, _ in loader)


def _check(name: str, stream: Stream, images: ImageSet, device: torch.device) -> None:
    """Raise RuntimeError unless the first batch's images are those of the data set."""
    batch = next(iter(stream.epoch(1)))
    rows = batch.indices.cpu().numpy()
    right = augmented(Batch(torch.from_numpy(images.images[rows]).to(device), batch.labels, batch.indices), 1)
    labels = torch.from_numpy(images.labels[rows])
    if not torch.equal(augmented(batch, 1), right) or not torch.equal(batch.labels.cpu(), labels):
        raise RuntimeError(f"the loader {name} yields other images than the data set's")


def loaders(
    images: ImageSet, options: LoaderOptions, device: torch.device, folder: Path
) -> tuple[dict[str, Epoch], dict[str, str]]:
    """(the loaders that can run here, why others cannot), by name."""
    streams: dict[str, Stream] = {}
    left_out: dict[str, str] = {}

    def add(name: str, loader: LoaderName, source: ImageSource, workers: int) -> None:
        stream = open_stream(
            loader, source, batch_size=options.batch_size, seed=SEED, device=device, workers=workers
        )
        _check(name, stream, images, device)
        streams[name] = stream

    add("resident", "resident", images, 0)
    reason = why_not()
    if reason is None and images.image_shape[2] == 3:
        path = folder / "images.beton"
        write_beton(images, path)
        beton = load_beton(path)
        add("ffcv", "ffcv", beton, 2)
        add("ffcv, 1 worker", "ffcv", beton, 1)
    else:
        left_out["ffcv"] = reason or "grey images"
    add("torchvision, trainer's stream", "torchvision", images, 0)
    found: dict[str, Epoch] = {
        BASELINE: _familiar(images, 2, options, device),
        "torchvision, no workers": _familiar(images, 0, options, device),
    }
    found |= {name: _of_stream(stream) for name, stream in streams.items()}
    return found, left_out


def _time(epoch: Iterator[Tensor], device: torch.device) -> tuple[int, float]:
    """(images, seconds) of an epoch."""
    begin = time.perf_counter()
    count = sum(len(batch) for batch in epoch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count, time.perf_counter() - begin


def measure(options: LoaderOptions) -> dict[str, object]:
    """The figures: `conditions`, and `loaders`: name → images_per_second, ratio, and each epoch's figure."""
    device = pick_device(options.device)
    images = _images(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            found, left_out = loaders(images, options, device, Path(folder))
            for repeat in range(options.repeats + 1):  # the first warms up
                for name, epoch in found.items():
                    if repeat == 0 and name.startswith(BASELINE):
                        continue  # nothing to warm up, and the slowest
                    count, seconds = _time(epoch(repeat + 1), device)
                    if count != len(images):
                        raise RuntimeError(f"the loader {name} yields {count} images of {len(images)}")
                    if repeat:
                        rates.setdefault(name, []).append(count / seconds)
    finally:
        torch.set_num_threads(threads)
    baseline = statistics.median(rates[BASELINE])
    return {
        "conditions": {
            **environment(device),
            "torch_threads_while_timing": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "dataset": options.dataset,
            "images": len(images),
            "image_shape": list(images.image_shape),
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "batch": "float32, random crop (padding 4), flip, in [0, 1], on the device",
            "baseline": "torchvision: DataLoader, Pillow, RandomCrop, flip, ToTensor, 2 workers",
            "left_out": left_out,
        },
        "loaders": {
            name: {
                "images_per_second": statistics.median(values),
                "ratio": statistics.median(values) / baseline,
                "each": values,
            }
            for name, values in rates.items()
        },
    }


def main(arguments: Sequence[str]) -> int:
    """Print a table, write JSON where asked; returns the exit code."""
    options = tyro.cli(LoaderOptions, args=list(arguments), prog="arat-fast bench loaders")
    check_writable(options.json)
    for name, value in (("images", options.images + 1), ("repeats", options.repeats)):
        if value < 1:
            raise UserError(f"--{name} is too small: give at least 1")
    if options.batch_size < 1 or options.side < 1:
        raise UserError("--batch-size and --side must be at least 1")
    result = measure(options)
    figures, conditions = result["loaders"], result["conditions"]
    assert isinstance(figures, dict)
    assert isinstance(conditions, dict)
    rows = [
        [
            name,
            f"{figure['images_per_second']:,.0f}",
            f"{figure['ratio']:.1f} x",
            f"{min(figure['each']):,.0f} - {max(figure['each']):,.0f}",
        ]
        for name, figure in figures.items()
    ]
    print(format_table(["loader", "images/s", "ratio", "slowest - fastest epoch"], rows))
    shape = " x ".join(map(str, conditions["image_shape"]))
    print(f"{conditions['images']:,} images of {shape}, batch {options.batch_size}, {conditions['device']}")
    for name, reason in conditions["left_out"].items():
        print(f"not measured: {name}: {reason}")
    if options.json is not None:
        write_json(options.json, result)
    return 0
