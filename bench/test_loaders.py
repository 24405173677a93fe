"""An epoch of each loader, ending in the same float batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arat_fast.benchmarks.loaders import LoaderOptions, loaders, synthetic_images

Epoch = Callable[[int], Iterator[Tensor]]


def _whole(epoch: Epoch, images: int) -> Callable[[], object]:
    numbers = count(1)

    def call() -> None:
        assert sum(len(batch) for batch in epoch(next(numbers))) == images

    return call


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loaders(compare: Callable[..., None], device: torch.device, tmp_path: Path) -> None:
    options = LoaderOptions(images=50_000 if device.type == "cuda" else 10_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Every stream's first batch is compared with the data set's images as it is opened.
        found, left_out = loaders(synthetic_images(options), options, device, tmp_path)
        calls = {name: _whole(epoch, options.images) for name, epoch in found.items()}
        calls = {"resident": calls.pop("resident"), **calls}
        compare(
            f"loaders, {options.images:,} images of 32x32, batch {options.batch_size}",
            calls,
            check=lambda: None,
            images=options.images,
            left_out=left_out,
        )
    finally:
        torch.set_num_threads(threads)
