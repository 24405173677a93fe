"""What a training method is: an attack, a plan of forwards, and named loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Outputs:
    """What one training pass gave, in fp32 or wider.

    clean, adv: logits (N, classes) of the clean and adversarial images, None where the plan has no such part.
    taps_clean, taps_adv: pooled features (N, C) by BatchNorm layer.
    """

    clean: Tensor | None = None
    adv: Tensor | None = None
    taps_clean: dict[str, Tensor] = field(default_factory=dict)
    taps_adv: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """A training objective. Its predictors, teachers and averages are in its state_dict.

    plan: which images go through the network in the training pass, in one concatenated batch: "clean", "adv"
    or both, each through the BatchNorm branch of `branches`. taps: BatchNorm layers whose features `loss`
    wants. Whatever changes between iterations is a 0-d tensor, so that a captured graph obeys it.
    """

    plan: tuple[str, ...] = ("adv",)
    branches: tuple[str, ...] = ("adv",)
    taps: tuple[str, ...] = ()
    attacks: bool = True

    @abstractmethod
    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Named, weighted terms whose sum is minimised."""
