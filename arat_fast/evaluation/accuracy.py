"""Which images a network still classifies correctly: clean, and under PGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.errors import TrainingError
from arat_fast.evaluation.float32 import full_float32
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.stream import counter_seed


def batches(data: ImageSet, size: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(offset, images in [0, 1] NCHW fp32, labels) of a data set, in its order."""
    for offset in range(0, len(data), size):
        images = torch.from_numpy(data.images[offset : offset + size]).to(device)
        labels = torch.from_numpy(data.labels[offset : offset + size]).to(device)
        yield offset, images.permute(0, 3, 1, 2).contiguous().float() / 255, labels


@torch.no_grad()
def finite_logits(network: nn.Module, images: Tensor) -> Tensor:
    """(B, classes) logits. Raises TrainingError where one is not finite: its argmax would be some class."""
    logits: Tensor = network(images)
    if not torch.isfinite(logits).all():
        raise TrainingError("the network's outputs are not finite: its weights are spoilt, train it again")
    return logits


def _correct(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return finite_logits(network, images).argmax(1).eq(labels).cpu()


@full_float32(benchmark=True)
def clean_correct(
    network: nn.Module, data: ImageSet, *, branch: str = "adv", batch_size: int = 250, device: torch.device
) -> Tensor:
    """(N,) bool: the image is classified correctly in eval mode by the branch. The network's mode is put
    back. Raises TrainingError where outputs are not finite.
    """
    parts = []
    with reference.attack_mode(network, branch, batch_statistics=False):
        for _, images, labels in batches(data, batch_size, device):
            parts.append(_correct(network, images, labels))
    return torch.cat(parts)


@full_float32(benchmark=True)
def pgd_correct(
    network: nn.Module,
    data: ImageSet,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: str = "Linf",
    loss: str = "ce",
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> Tensor:
    """(N,) bool: still correct under every restart of PGD against the inference branch with running
    statistics.

    Random starts depend on (seed, restart, offset) alone. `progress` is told how many images each batch
    finished. Raises TrainingError where outputs are not finite.
    """
    robust = []
    with reference.attack_mode(network, "adv", batch_statistics=False):
        for offset, images, labels in batches(data, batch_size, device):
            survived = _correct(network, images, labels)
            for restart in range(restarts):
                generator = torch.Generator(device).manual_seed(counter_seed(seed, restart, offset))
                start = reference.random_start(images, eps, norm, generator)
                x_adv = reference.pgd(
                    network,
                    images,
                    labels,
                    eps=eps,
                    alpha=alpha,
                    steps=steps,
                    norm=norm,
                    start=start,
                    loss=loss,
                    batch_statistics=False,
                )
                survived &= _correct(network, x_adv, labels)
            robust.append(survived)
            progress(len(images))
    return torch.cat(robust)
