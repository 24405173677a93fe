"""Distillation in the manner of ARREST (Suzuki et al., ICCV 2023), whose authors released no code.

    L = CE(f(x'), y) + weight * mean(1 - cos(features of f at x', features of g at x))

g is a frozen, ordinarily trained network and f starts from its weights; features are the classifier's input.
This form, its weight and AT's attack are this project's.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.config import ARRESTConfig
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import wide

FEATURES = ""  # the tap before the classifier


class ARREST(Method):
    """teacher: a network of `arat_fast.models` with one BatchNorm branch, trained; it is frozen here.

    Its weights are in the state_dict, so that a run goes on without the teacher's own.
    """

    name = "arrest"
    taps = (FEATURES,)

    def __init__(self, config: ARRESTConfig, teacher: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the teacher, whose running statistics stay."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms ce_adv and distillation."""
        assert outputs.adv is not None
        assert outputs.images is not None
        taps = {FEATURES: outputs.images}
        half = torch.autocast(outputs.images.device.type, self.compute, enabled=self.compute.itemsize == 2)
        with torch.no_grad(), half:
            self.teacher(outputs.images, taps)
        similarity = F.cosine_similarity(wide(outputs.taps_adv[FEATURES]), wide(taps[FEATURES]), dim=1)
        return {
            "ce_adv": F.cross_entropy(wide(outputs.adv), labels),
            "distillation": self.config.weight * (1 - similarity).mean(),
        }
