"""TRADES (Zhang et al., ICML 2019): CE(f(x), y) + beta KL(p(x) ‖ p(x')), gradients through both.

The published attack maximises the same KL from x + 0.001 normal noise, on running statistics.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arat_fast.config import TRADESConfig
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import kl_from_clean, wide


class TRADES(Method):
    """Clean and adversarial images in one batch, each part with statistics of its own.

    `duplicate_forward` forwards the clean images once more, as the published code does: the same loss, and
    one more update of the running statistics.
    """

    name = "trades"
    plan = ("clean", "adv")

    def __init__(self, config: TRADESConfig) -> None:
        super().__init__()
        self.config = config
        self.repeats_clean = config.duplicate_forward

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms ce_clean and kl."""
        assert outputs.clean is not None
        assert outputs.adv is not None
        clean, adv = wide(outputs.clean), wide(outputs.adv)
        return {
            "ce_clean": F.cross_entropy(clean, labels),
            "kl": self.config.beta * kl_from_clean(clean, adv).mean(),
        }
