"""What a training method is: a plan of forwards, and named loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Outputs:
    """What one training pass gave, in fp32 or wider.

    clean, adv: logits (N, classes) of the clean and adversarial images, None where the plan has no such part.
    taps_clean, taps_adv: pooled features (N, C) by BatchNorm layer.
    images, x_adv: the images themselves, (N, C, H, W) channels-last in [0, 1], for methods with a second
    network or a gradient at the images. network: logits by the inference branch with running statistics,
    differentiable twice.
    """

    clean: Tensor | None = None
    adv: Tensor | None = None
    taps_clean: dict[str, Tensor] = field(default_factory=dict)
    taps_adv: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    x_adv: Tensor | None = None
    network: Callable[[Tensor], Tensor] | None = None


class Method(nn.Module, ABC):
    """A training objective. Its predictors, teachers and averages are in its state_dict.

    plan: which images go through the network in the training pass, in one concatenated batch: "clean", "adv"
    or both; the first through the first BatchNorm branch of `branches` and so on, or all through the only
    branch, each part with statistics of its own. taps: BatchNorm layers whose features `loss` wants; "" is
    the classifier's input. repeats_clean: one more update of the running statistics by the clean images.
    name: as in the configuration. compute: precision of a second network's convolutions.
    Whatever changes between iterations is a 0-d tensor, so that a captured graph obeys it; but `plan` may
    change between epochs, which is then compiled and captured anew.
    """

    name: str = ""
    plan: tuple[str, ...] = ("adv",)
    branches: tuple[str, ...] = ("adv",)
    taps: tuple[str, ...] = ()
    attacks: bool = True
    repeats_clean: bool = False
    compute: torch.dtype = torch.float32

    @abstractmethod
    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Named, weighted terms whose sum is minimised."""

    def on_epoch_start(self, epoch: int, rate_factor: float) -> None:
        """Set what depends on the epoch (from 1): `rate_factor` is the learning rate over its full value."""
