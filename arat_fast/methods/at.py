"""Adversarial training: CE(f(x'), y) (Madry et al. 2018; Rice et al. 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import wide


class AT(Method):
    """The cross entropy of the adversarial images, one BatchNorm."""

    name = "at"

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Term ce_adv."""
        assert outputs.adv is not None
        return {"ce_adv": F.cross_entropy(wide(outputs.adv), labels)}
