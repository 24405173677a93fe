"""Clean and adversarial images in one network: how far apart their features and statistics are (ARAT paper,
mixture distribution problem).

A layer is a BatchNorm, its feature the average-pooled ReLU (C,) of that BatchNorm's output, as in the paper's
loss; x' is made by the run's evaluation attack and BatchNorm uses running statistics.

    distance  = mean over images of |z' - z|_2, both through the adv branch;  relative: of |z' - z| / |z|
    J(p, q)   = (KL(p||q) + KL(q||p)) / 2
              = (s_p/s_q + s_q/s_p - 2 + (m_p - m_q)^2 (1/s_p + 1/s_q)) / 4      of N(m_p, s_p), N(m_q, s_q)

J, in nats, compares a channel's mean m and variance s (plus BatchNorm's 1e-5) and is averaged over channels:
`running` of the two branches' running statistics; `measured` of the BatchNorm's inputs over the test images,
clean ones through the clean branch and adversarial ones through the adv branch; `through_adv` the same with
both through the adv branch. Without split BatchNorm there is one branch for both, and no `running`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast import reference

Statistics = dict[str, tuple[Tensor, Tensor]]  # layer -> mean and variance of each channel
EPS = 1e-5


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """The network's BatchNorms by name, in its order; one with two branches counts once."""
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, reference.SplitBatchNorm2d | nn.BatchNorm2d)
    }
    inner = {
        f"{n}.{b}"
        for n, m in found.items()
        if isinstance(m, reference.SplitBatchNorm2d)
        for b in ("clean", "adv")
    }
    return {name: module for name, module in found.items() if name not in inner}


def gaussian_divergence(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """J of each channel, (C,) in nats: the mean of both directions' KL divergence; see the file's formula."""
    s_p, s_q = var_p.double() + EPS, var_q.double() + EPS
    gap = (mean_p.double() - mean_q.double()).square()
    return (s_p / s_q + s_q / s_p - 2 + gap * (1 / s_p + 1 / s_q)) / 4


def divergence(p: Statistics, q: Statistics) -> dict[str, dict[str, float]]:
    """J by layer: `mean` and `median` over its channels; a nearly dead channel can rule the mean."""
    result = {}
    for name, (mean, var) in p.items():
        each = gaussian_divergence(mean, var, *q[name])
        result[name] = {"mean": float(each.mean()), "median": float(each.median())}
    return result


def running_statistics(network: nn.Module, branch: str) -> Statistics:
    """The branch's running mean and variance by layer; a single BatchNorm's own whatever the branch."""
    statistics = {}
    for name, module in batch_norms(network).items():
        norm = getattr(module, branch) if isinstance(module, reference.SplitBatchNorm2d) else module
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        statistics[name] = (norm.running_mean.clone(), norm.running_var.clone())
    return statistics


class InputStatistics:
    """Mean and variance of every BatchNorm's input, over all images and places of the forwards inside
    `watch`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[None]:
        """Count the forwards inside the block."""
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in batch_norms(network).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()  # a sum of squares in fp32 loses the variance of a large mean
            moments = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            self._sums[name] = self._sums[name] + moments if name in self._sums else moments
            self._counts[name] = self._counts.get(name, 0) + x.numel() // x.shape[1]

        return record

    def result(self) -> Statistics:
        """Mean and biased variance by layer."""
        statistics = {}
        for name, (total, squares) in self._sums.items():
            mean = total / self._counts[name]
            statistics[name] = (mean, (squares / self._counts[name] - mean.square()).clamp_min(0))
        return statistics


def feature_distance(z_adv: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(|z' - z|_2, |z' - z|_2 / |z|_2) of each image, for (N, C) features."""
    gap = (z_adv - z).double().norm(dim=1)
    return gap, gap / z.double().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def measure_mixture(network: nn.Module, attacked: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """Distances and divergences over batches of (x, x', labels), as plain values by layer.

    Modes and branches of the network are put back, its statistics untouched.
    """
    names = list(batch_norms(network))
    split = any(isinstance(m, reference.SplitBatchNorm2d) for m in network.modules())
    totals = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    count = 0
    own_clean, clean, adv = InputStatistics(), InputStatistics(), InputStatistics()

    def features(images: Tensor, branch: str, statistics: InputStatistics) -> dict[str, Tensor]:
        with (
            reference.attack_mode(network, branch, batch_statistics=False),
            statistics.watch(network),
            reference.tapped(network, names) as taps,
        ):
            network(images)
        return taps

    for images, x_adv, _ in attacked:
        z, z_adv = features(images, "adv", clean), features(x_adv, "adv", adv)
        if split:
            features(images, "clean", own_clean)
        for name in names:
            gap, relative = feature_distance(z_adv[name], z[name])
            totals[name] += torch.stack([gap.sum(), relative.sum()]).cpu()
        count += len(images)
    if count == 0:
        raise ValueError("attacked gave no batch; expected at least one")
    through_adv = divergence(clean.result(), adv.result())
    measured = divergence(own_clean.result(), adv.result()) if split else through_adv
    running = None
    if split:
        running = divergence(running_statistics(network, "clean"), running_statistics(network, "adv"))
    layers = {
        name: {
            "distance": float(totals[name][0]) / count,
            "relative": float(totals[name][1]) / count,
            "divergence": {
                "running": running[name] if running else None,
                "measured": measured[name],
                "through_adv": through_adv[name],
            },
        }
        for name in names
    }
    return {"n": count, "split_bn": split, "layers": layers}


def epoch_variance(
    snapshots: Iterable[Mapping[str, Mapping[str, list[float]]]],
) -> dict[str, dict[str, float]]:
    """branch -> layer -> variance over epochs of the BatchNorm's running means, averaged over channels.

    snapshots: one an epoch, branch -> layer -> running mean of each channel. Unbiased; {} below two epochs.
    """
    collected = list(snapshots)
    if len(collected) < 2:
        return {}
    return {
        branch: {
            layer: float(
                torch.tensor([s[branch][layer] for s in collected], dtype=torch.float64).var(0).mean()
            )
            for layer in layers
        }
        for branch, layers in collected[0].items()
    }
