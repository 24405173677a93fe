"""Ordinary training: CE(f(x), y)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arat_fast.methods.base import Method, Outputs


class Standard(Method):
    """No attack; what adversarially trained networks are compared with."""

    name = "standard"
    plan = ("clean",)
    attacks = False

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """The cross entropy of the clean images."""
        assert outputs.clean is not None
        return {"ce_clean": F.cross_entropy(outputs.clean, labels)}
