"""Robustness against accuracy, and accuracy over the radius of the attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arat_fast.evaluation.accuracy import clean_correct, pgd_correct
from arat_fast.evaluation.network import TrainedNetwork
from arat_fast.evaluation.record import binomial_error
from arat_fast.loaders.images import ImageSet

MULTIPLES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of the run's evaluation radius


def _figure(correct: Tensor) -> dict[str, Any]:
    accuracy = int(correct.sum()) / len(correct)
    return {"accuracy": accuracy, "n": len(correct), "error_95": binomial_error(accuracy, len(correct))}


def accuracy_at(
    trained: TrainedNetwork,
    data: ImageSet,
    eps: float,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Accuracy of the inference branch under PGD of the radius: the run's evaluation attack with its step
    size scaled by eps / its eps; clean accuracy at 0.
    """
    settings = trained.config.evaluation
    if eps == 0:
        correct = clean_correct(trained.network, data, batch_size=settings.batch_size, device=device)
        progress(len(data))
        return {"eps": 0.0, "alpha": 0.0, "steps": 0} | _figure(correct)
    alpha = settings.alpha * eps / settings.eps if settings.eps else settings.alpha
    correct = pgd_correct(
        trained.network,
        data,
        eps=eps,
        alpha=alpha,
        steps=settings.steps,
        norm=settings.norm,
        seed=seed,
        batch_size=settings.batch_size,
        device=device,
        progress=progress,
    )
    return {"eps": eps, "alpha": alpha, "steps": settings.steps} | _figure(correct)


def measure_epsilons(
    trained: TrainedNetwork,
    data: ImageSet,
    *,
    multiples: Sequence[float] = MULTIPLES,
    seed: int = 0,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Accuracy at multiples of the run's evaluation radius (none above the whole pixel range), as plain
    values.
    """
    settings = trained.config.evaluation
    radii = sorted(
        {min(m * settings.eps, 1.0) if settings.norm == "Linf" else m * settings.eps for m in multiples}
    )
    return {
        "norm": settings.norm,
        "eps": settings.eps,
        "points": [
            accuracy_at(trained, data, eps, seed=seed, device=device, progress=progress) for eps in radii
        ],
    }


def measure_tradeoff(
    trained: TrainedNetwork,
    data: ImageSet,
    *,
    seed: int = 0,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Clean and robust accuracy at the run's evaluation radius, and their sum, as plain values."""
    settings = trained.config.evaluation
    clean = accuracy_at(trained, data, 0.0, seed=seed, device=device, progress=progress)
    robust = accuracy_at(trained, data, settings.eps, seed=seed, device=device, progress=progress)
    return {
        "norm": settings.norm,
        "clean": clean,
        "robust": robust,
        "sum": clean["accuracy"] + robust["accuracy"],
    }
