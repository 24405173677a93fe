"""Small data in every form, for the tests of the loaders."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arat_fast.loaders.beton_set import BetonSet, load_beton
from arat_fast.loaders.beton_write import Encoding, write_beton
from arat_fast.loaders.choose import LoaderName, open_stream
from arat_fast.loaders.ffcv_runtime import why_not
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.stream import WHOLE, Batch, Shard, Stream

CPU = torch.device("cpu")
needs_ffcv = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
# Every loader, with one and with several workers.
VARIANTS = [
    pytest.param("resident", 0, id="resident"),
    pytest.param("torchvision", 0, id="torchvision-0"),
    pytest.param("torchvision", 2, id="torchvision-2"),
    pytest.param("ffcv", 1, id="ffcv-1", marks=needs_ffcv),
    pytest.param("ffcv", 3, id="ffcv-3", marks=needs_ffcv),
]


def random_images(count: int = 203, side: int = 16, classes: int = 7, seed: int = 0) -> ImageSet:
    """Random RGB images in memory."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, classes, count), classes, "random")


def raw_beton(folder: Path, images: ImageSet, name: str = "images.beton") -> BetonSet:
    """The images, written raw and read back as a data set."""
    write_beton(images, folder / name)
    return load_beton(folder / name)


def smooth_photo(height: int, width: int, seed: int) -> Image.Image:
    """A colourful photo without noise, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def photo_folder(root: Path, classes: int = 3, each: int = 4) -> Path:
    """train/ and val/ with class folders of JPEG photos of several sizes."""
    for part, offset in (("train", 0), ("val", 1_000)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for k in range(each):
                seed = offset + 100 * label + k
                smooth_photo(40 + 7 * k, 60 - 5 * label, seed).save(folder / f"{k}.jpg", quality=95)
    return root


def stream_of(
    name: LoaderName,
    images: ImageSource,
    workers: int = 0,
    *,
    batch_size: int = 32,
    seed: int = 5,
    shard: Shard = WHOLE,
    folder: Path | None = None,
) -> Stream:
    """A loader's stream; for ffcv the images are written to `folder` first, unless they are a file."""
    if name == "ffcv" and not isinstance(images, BetonSet):
        assert folder is not None
        assert isinstance(images, ImageSet)
        images = raw_beton(folder, images)
    return open_stream(
        name, images, batch_size=batch_size, seed=seed, device=CPU, workers=workers, shard=shard
    )


def own_images(batch: Batch) -> torch.Tensor:
    """The batch's own images, also where they lie in a resident store."""
    return batch.images[batch.indices] if batch.resident else batch.images


def everything(
    stream: Stream, epoch: int = 1, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images, labels, indices) of an epoch; batches are kept as they came, so a reused buffer would show."""
    batches = list(stream.epoch(epoch, first))
    parts = [[own_images(b) for b in batches], [b.labels for b in batches], [b.indices for b in batches]]
    images, labels, indices = (torch.cat(part) for part in parts)
    return images, labels, indices


def run_script(script: str, *arguments: str, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; fails the test when it takes longer than `limit` seconds."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(script)
    here = str(Path(__file__).parent)
    try:
        return subprocess.run(
            [sys.executable, "-c", code, here, *arguments], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs: {error.stdout!r} {error.stderr!r}")


def jpeg(quality: int = 95) -> Encoding:
    """JPEG for every image."""
    return dataclasses.replace(Encoding(), mode="jpeg", quality=quality)
