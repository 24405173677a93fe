"""What is looked at once, before the first iteration, because it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from arat_fast.attacks.attack_mode import has_split_bn
from arat_fast.attacks.checks import check_labels_fit, largest_label, logits_of
from arat_fast.nn import bn_mode

Autocast = Callable[[], AbstractContextManager[object]]


def two_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The first two, (N, C, H, W) channels-last in [0, 1] of `dtype`; of uint8 (N, H, W, C) or float."""
    images = images[:2]
    if images.dtype == torch.uint8:
        return images.permute(0, 3, 1, 2).to(dtype) / 255
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def try_forward(module: nn.Module, x: Tensor, autocast: Autocast) -> Tensor:
    """Logits of the modes as they are but with running statistics; random numbers and buffers are put back.

    Uncompiled: another size would compile a compiled module anew. Raises what the module does, TypeError or
    ValueError for an output that is not logits (N, classes).
    """
    before = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    statistics = bn_mode(module, "running", update=False) if has_split_bn(module) else nullcontext()
    try:
        with (
            torch.random.fork_rng([x.device] if x.is_cuda else []),
            torch.compiler.set_stance("force_eager"),
            statistics,
            autocast(),
        ):
            return logits_of(module(x), len(x))
    finally:
        for owner, name, buffer, value in before:
            owner._buffers[name] = buffer  # it may have been given another
            if 0 not in buffer.stride():  # an expanded one cannot have been written to
                buffer.copy_(value)


def check_values(images: Tensor, labels: Tensor, classes: int) -> None:
    """ValueError for float pixels outside [0, 1], NaN, and labels of no class; uint8 ones are a loader's."""
    if images.is_floating_point():
        check_labels_fit(largest_label(images, labels), classes)
