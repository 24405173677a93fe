"""What kernel tests share: marks, canaries for out-of-bounds writes, and the rule for accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_fast.kernels.dispatch import INTERPRETING

compiled_only = pytest.mark.skipif(INTERPRETING, reason="the interpreter takes real tensors only")


def gpu_only(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test `gpu`; it is skipped where there is none."""
    no_gpu = not torch.cuda.is_available() or INTERPRETING
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="no GPU, or interpreting")(test))


class Canary:
    """Tensors inside larger buffers whose margins hold a pattern: a stray write of a kernel is seen.

    `like(tensor)` gives a copy of `tensor` (shape, strides, dtype, device, values) between margins; `check()`
    fails when a margin has changed.
    """

    MARGIN = 1024  # elements: 16-byte alignment is kept for every dtype
    BYTE = 0x5A

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def like(self, tensor: Tensor) -> Tensor:
        numel = tensor.numel()
        buffer = torch.empty(numel + 2 * self.MARGIN, dtype=tensor.dtype, device=tensor.device)
        buffer.view(torch.uint8).fill_(self.BYTE)
        self._buffers.append((buffer, numel))
        inside = buffer[self.MARGIN : self.MARGIN + numel].as_strided(
            tensor.shape, tensor.stride(), storage_offset=self.MARGIN
        )
        return inside.copy_(tensor)

    def check(self) -> None:
        for buffer, numel in self._buffers:
            for margin in (buffer[: self.MARGIN], buffer[self.MARGIN + numel :]):
                assert bool((margin.view(torch.uint8) == self.BYTE).all()), "a kernel wrote out of bounds"


class GuardedAllocation:
    """Stands in for `torch` in a launcher's module: what it allocates lies between a canary's margins."""

    def __init__(self, canary: Canary) -> None:
        self.canary = canary

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, **options: Any) -> Tensor:
        return self.canary.like(torch.empty(*size, **options))

    def empty_like(self, tensor: Tensor) -> Tensor:
        return self.canary.like(torch.empty_like(tensor))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Root-mean-square error against float64, relative to the RMS of the exact values."""
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    scale = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((value - exact).square().mean().sqrt() / scale)


def assert_as_accurate_as(value: Tensor, pytorch: Tensor, exact: Tensor, hair: float = 1e-6) -> None:
    """The rule: error against float64 at most twice that of PyTorch in the same dtype, plus a hair.

    Both the RMS error and the largest error are held to it, each relative to the RMS of the exact values.
    """
    assert value.shape == exact.shape, (value.shape, exact.shape)
    scale = float(exact.double().square().mean().sqrt()) or 1.0
    ours, theirs = relative_error(value, exact), relative_error(pytorch, exact)
    assert ours <= 2 * theirs + hair, f"RMS error {ours:.3g}; PyTorch's in the same dtype is {theirs:.3g}"
    worst, their_worst = (
        float((tensor.detach().double().cpu() - exact.detach().double().cpu()).abs().max()) / scale
        for tensor in (value, pytorch)
    )
    assert worst <= 2 * their_worst + 10 * hair, f"worst error {worst:.3g}; PyTorch's is {their_worst:.3g}"


def channels_last(tensor: Tensor) -> Tensor:
    """A channels-last copy of a 4-d tensor."""
    return tensor.contiguous(memory_format=torch.channels_last)
