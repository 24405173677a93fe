"""The effective margin: how far an image is from the nearest decision boundary, to first order (Liu and Chan
2022).

    margin = (z_y - z_j) / |dz_y/dx - dz_j/dx|_2      j: the runner-up, the largest logit but the true one's

An L2 distance in pixel units of [0, 1]; negative where the image is misclassified.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast import reference

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40


def effective_margin(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) effective margins of images (N, C, H, W), in the network's present mode and branch.

    Infinite, with the sign of the logits' difference, where the gradient is zero; not a number where that is
    zero too.
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = network(x)
        true = logits.gather(1, labels[:, None])[:, 0]
        runner_up = logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
        gap = true - logits.gather(1, runner_up[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(gap.sum(), x)
    return gap.detach() / gradient.flatten(1).norm(dim=1)


def measure_margin(network: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Distribution of the effective margin of the inference branch with running statistics, as plain values.

    data: batches of (images, labels).
    """
    with reference.attack_mode(network, "adv", batch_statistics=False):
        each = [effective_margin(network, images, labels).cpu() for images, labels in data]
    if not each:
        raise ValueError("data gave no batch; expected at least one")
    return summarise(torch.cat(each))


def summarise(margins: Tensor) -> dict[str, Any]:
    """Histogram, quantiles, mean, share at or below zero, and every value; of the finite ones."""
    finite = margins[margins.isfinite()].double()
    if not len(finite):
        raise ValueError("no margin is finite: the network's logits do not depend on the image")
    counts, edges = torch.histogram(finite, BINS)
    return {
        "n": len(finite),
        "not_finite": len(margins) - len(finite),
        "share_not_positive": float((finite <= 0).double().mean()),
        "mean": float(finite.mean()),
        "quantiles": {
            f"{q:g}": float(v)
            for q, v in zip(
                QUANTILES, finite.quantile(torch.tensor(QUANTILES, dtype=torch.float64)), strict=True
            )
        },
        "histogram": {"edges": edges.tolist(), "counts": [int(c) for c in counts]},
        "values": [float(f"{v:.6g}") for v in finite],
    }
