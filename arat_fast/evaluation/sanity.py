"""Signs of gradient masking (Athalye et al. 2018, Carlini et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.evaluation.accuracy import batches, pgd_correct
from arat_fast.evaluation.autoattack import autoattack_correct
from arat_fast.evaluation.float32 import full_float32
from arat_fast.loaders.images import ImageSet
from arat_fast.pixels import format_pixels

STEPS = (1, 5, 20, 50)
RESTARTS = 3
QUERIES = 1000
GROWTH = (1, 2, 4, 8)  # multiples of eps, up to the whole pixel range
NEARLY_ZERO = 0.05


@dataclass(frozen=True)
class Check:
    """One check: its verdict and the figures it rests on."""

    name: str
    passed: bool
    figures: str

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def _accuracy(correct: Tensor) -> float:
    return float(correct.float().mean())


def _never_rises(values: list[float], slack: float) -> bool:
    return all(later <= earlier + slack for earlier, later in pairwise(values))


def _percent(values: list[float]) -> str:
    return " → ".join(f"{100 * v:.1f}" for v in values)


def _losses(
    network: nn.Module, data: ImageSet, eps: float, alpha: float, norm: str, device: torch.device
) -> list[float]:
    """Mean cross entropy before the attack and after each of ten PGD steps from the images themselves."""
    totals = torch.zeros(11)
    with reference.attack_mode(network, "adv", batch_statistics=False):
        for _, images, labels in batches(data, 250, device):
            x_adv = images
            for step in range(11):
                with torch.no_grad():
                    totals[step] += F.cross_entropy(network(x_adv), labels, reduction="sum").cpu()
                start = x_adv - images
                x_adv = reference.pgd(
                    network,
                    images,
                    labels,
                    eps=eps,
                    alpha=alpha,
                    steps=1,
                    norm=norm,
                    start=start,
                    batch_statistics=False,
                )
    return [float(t) / len(data) for t in totals]


@full_float32(benchmark=True)
def sanity_checks(
    network: nn.Module,
    data: ImageSet,
    *,
    eps: float,
    alpha: float,
    norm: str = "Linf",
    device: torch.device,
    progress: Callable[[str], object] = lambda name: None,
) -> list[Check]:
    """Four checks of the inference branch on the given images, each with its figures; slack is one image or 1
    %.
    """
    slack = max(1 / len(data), 0.01) + 1e-9

    def attacked(steps: int, radius: float, restarts: int = 1) -> float:
        # A larger ball needs larger steps to be crossed in the same number of them.
        return _accuracy(
            pgd_correct(
                network,
                data,
                eps=radius,
                alpha=max(alpha, radius / 10),
                steps=steps,
                norm=norm,
                restarts=restarts,
                device=device,
            )
        )

    progress("more steps and restarts")
    by_steps = [attacked(steps, eps) for steps in STEPS]
    by_steps.append(attacked(STEPS[-1], eps, RESTARTS))
    checks = [
        Check(
            "more steps and restarts never help the defender",
            _never_rises(by_steps, slack),
            f"PGD with {', '.join(map(str, STEPS))} steps, then {RESTARTS} restarts: {_percent(by_steps)} %",
        )
    ]
    progress("growing eps")
    radii = [min(eps * k, 1.0) for k in GROWTH]
    by_radius = [attacked(STEPS[-1], radius) for radius in radii]
    checks.append(
        Check(
            "accuracy falls to about zero as eps grows",
            _never_rises(by_radius, slack) and by_radius[-1] <= NEARLY_ZERO,
            f"eps {', '.join(format_pixels(r) for r in radii)}: {_percent(by_radius)} %",
        )
    )
    progress("black box")
    square = _accuracy(
        autoattack_correct(
            network, data, eps=eps, norm=norm, attacks=("square",), queries=QUERIES, device=device
        )
    )
    checks.append(
        Check(
            "black-box (Square) is not stronger than white-box",
            square >= by_steps[-1] - slack,
            f"Square with {QUERIES} queries {100 * square:.1f} %, PGD {100 * by_steps[-1]:.1f} %",
        )
    )
    progress("loss along the attack")
    losses = _losses(network, data, eps, alpha, norm, device)
    rises = sum(later > earlier for earlier, later in pairwise(losses))
    checks.append(
        Check(
            "loss rises along the attack",
            rises >= 8 and losses[-1] > losses[0],
            f"cross entropy over 10 steps: {losses[0]:.3f} → {losses[1]:.3f} → … → {losses[-1]:.3f}, "
            f"{rises} of 10 steps raise it",
        )
    )
    return checks
