"""Benchmark cases of the PGD step, random start and augmentation, against eager PyTorch and Inductor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arat_fast.kernels.augment import random_crop_flip, random_crop_flip_reference
from arat_fast.kernels.pgd import linf_step_reference, pgd_step
from arat_fast.kernels.pgd_l2 import l2_step_reference
from arat_fast.kernels.random_start import random_start, random_start_reference

from .cases import BenchmarkCase

EPS, ALPHA = 8 / 255, 2 / 255


def _images(count: int, side: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.rand((count, 3, side, side), device=device, generator=generator)
    return images.to(memory_format=torch.channels_last)


def _pgd(norm: str, count: int, side: int, grad_dtype: torch.dtype, device: torch.device) -> BenchmarkCase:
    reference = linf_step_reference if norm == "Linf" else l2_step_reference
    eps, alpha = torch.tensor(EPS, device=device), torch.tensor(ALPHA, device=device)

    def make(seed: int) -> tuple[Tensor, ...]:
        x, noise, grad = (_images(count, side, device, 3 * seed + i) for i in range(3))
        grad = ((grad - 0.5) * 1e-3).to(grad_dtype)
        return (x + EPS * (2 * noise - 1)).clamp(0, 1), x, grad

    def eager(x_adv: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return reference(x_adv, x, grad, eps, alpha)

    def ours(x_adv: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return pgd_step(x_adv, x, grad, eps, alpha, norm="Linf" if norm == "Linf" else "L2")

    return BenchmarkCase(
        f"pgd_step {norm}",
        f"{count}x3x{side}x{side} fp32, {str(grad_dtype).removeprefix('torch.')} gradient",
        count * 3 * side * side * (4 + 4 + grad_dtype.itemsize + 4),
        make,
        {"ours": ours, "eager": eager, "inductor": torch.compile(eager, fullgraph=True, dynamic=False)},
        tolerance=0.0 if norm == "Linf" else 1e-6,
    )


def _start(kind: str, count: int, side: int, device: torch.device) -> BenchmarkCase:
    eps = torch.tensor(EPS, device=device)
    seed, offset = (torch.tensor(value, device=device) for value in (1, 2))

    def eager(x: Tensor) -> Tensor:
        return random_start_reference(x, eps, seed, offset, kind)

    def ours(x: Tensor) -> Tensor:
        return random_start(x, eps, seed=seed, offset=offset, kind="uniform" if kind == "uniform" else "l2")

    return BenchmarkCase(
        f"random_start {kind}",
        f"{count}x3x{side}x{side} fp32",
        count * 3 * side * side * 8,
        lambda number: (_images(count, side, device, number),),
        {"ours": ours, "eager": eager, "inductor": torch.compile(eager, fullgraph=True, dynamic=False)},
        tolerance=1e-5,
    )


def _augment(
    count: int, side: int, dtype: torch.dtype, resident: bool, device: torch.device
) -> BenchmarkCase:
    seed, epoch = (torch.tensor(value, device=device) for value in (1, 2))
    stored = 4 * count if resident else count

    def make(number: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(number)
        size = (stored, side, side, 3)
        images = torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)
        return images, torch.randperm(stored, device=device, generator=generator)[:count]

    def eager(images: Tensor, indices: Tensor) -> Tensor:
        return random_crop_flip_reference(images, indices, seed, epoch, 4, True, dtype, resident)

    def ours(images: Tensor, indices: Tensor) -> Tensor:
        return random_crop_flip(images, indices, seed=seed, epoch=epoch, dtype=dtype, resident=resident)

    return BenchmarkCase(
        "random_crop_flip" + (", resident" if resident else ""),
        f"{count}x{side}x{side}x3 uint8 to {str(dtype).removeprefix('torch.')}",
        count * 3 * side * side * (1 + dtype.itemsize),
        make,
        {"ours": ours, "eager": eager, "inductor": torch.compile(eager, fullgraph=True, dynamic=False)},
        1e-7 if dtype == torch.float32 else 0.0,  # Inductor multiplies by 1/255
    )


def benchmark_cases(device: torch.device, small: bool = False) -> Iterator[BenchmarkCase]:
    """CIFAR at batch 2048 (bandwidth-bound) and 128 (launch-bound); on a CPU at 128."""
    shapes = [(2, 8)] if small else [(128, 32)] if device.type == "cpu" else [(2048, 32), (128, 32)]
    for count, side in shapes:
        for grad_dtype in (torch.float32, torch.bfloat16):
            yield _pgd("Linf", count, side, grad_dtype, device)
        yield _pgd("L2", count, side, torch.bfloat16, device)
        for kind in ("uniform", "l2"):
            yield _start(kind, count, side, device)
        for dtype in (torch.float32, torch.bfloat16):
            yield _augment(count, side, dtype, False, device)
        yield _augment(count, side, torch.bfloat16, True, device)
