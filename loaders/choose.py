"""Which loader feeds a run: `--loader auto|ffcv|resident|torchvision`."""

from __future__ import annotations

import logging
import os
from typing import Literal

import torch

from arat_fast.errors import UserError
from arat_fast.loaders.beton_set import BetonSet
from arat_fast.loaders.ffcv_runtime import why_not
from arat_fast.loaders.images import ImageSource
from arat_fast.loaders.resident import ResidentStream, resident_bytes
from arat_fast.loaders.stream import WHOLE, Shard, Stream
from arat_fast.loaders.torchvision import TorchvisionStream

log = logging.getLogger(__name__)

LoaderName = Literal["auto", "ffcv", "resident", "torchvision"]
# Of the device's memory: the rest is for weights, activations of twice the batch, and other processes.
RESIDENT_SHARE = 0.25
PREPARE = "write one with `arat-fast data prepare` and give its folder as --data-root"


def device_memory(device: torch.device) -> int:
    """Bytes of the device's memory in all: the GPU's, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose(source: ImageSource, device: torch.device) -> tuple[LoaderName, str]:
    """The loader that `auto` takes, and why."""
    size, memory = resident_bytes(source), device_memory(device)
    share = f"{size / 1e6:,.0f} MB, {size / memory:.1%} of the memory of {device}"
    if source.is_photos:
        not_resident = "photos are cropped anew each epoch"
    elif size <= RESIDENT_SHARE * memory:
        return "resident", f"the data set takes {share} (up to {RESIDENT_SHARE:.0%} is resident)"
    else:
        not_resident = f"the data set takes {share}, more than {RESIDENT_SHARE:.0%}"
    if not isinstance(source, BetonSet):
        return "torchvision", f"{not_resident}, and there is no .beton of it for FFCV: {PREPARE}"
    missing = why_not()
    if missing is not None:
        return "torchvision", f"{not_resident}, and {missing}"
    return "ffcv", not_resident


def open_stream(
    name: LoaderName,
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    shard: Shard = WHOLE,
) -> Stream:
    """The stream of the named loader; says in the log which it is and why, for `auto`.

    workers: threads (ffcv) or processes (torchvision); resident needs none. All loaders give the same
    batches, and for images of one size the same pixels.

    Raises UserError where the named loader cannot read this data set.
    """
    if name == "auto":
        name, reason = choose(source, device)
        log.info("loader: %s: %s", name, reason)
    if name == "resident":
        if source.is_photos:
            raise UserError(
                f"--loader resident: {source.source} holds photos, which are cropped anew each epoch; use "
                "--loader ffcv or torchvision"
            )
        return ResidentStream(source, batch_size=batch_size, seed=seed, device=device, shard=shard)
    if name == "torchvision":
        return TorchvisionStream(
            source, batch_size=batch_size, seed=seed, device=device, workers=workers, shard=shard
        )
    if not isinstance(source, BetonSet):
        raise UserError(f"--loader ffcv reads .beton files, and {source.source} is none: {PREPARE}")
    from arat_fast.loaders.ffcv import FFCVStream, Order

    larger_than_memory = source.file.path.stat().st_size > device_memory(torch.device("cpu")) // 2
    order: Order = "pages" if larger_than_memory else "random"
    if larger_than_memory:
        log.info("%s is larger than half the memory: neighbours on disk are read together", source.source)
    return FFCVStream(
        source, batch_size=batch_size, seed=seed, device=device, workers=workers, order=order, shard=shard
    )
