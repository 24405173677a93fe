"""MART (Wang et al., ICLR 2020): a boosted cross entropy, and KL weighed by how wrong the clean image is.

    BCE = CE(f(x'), y) - log(1.0001 - p_k*(x') + 1e-12)               k*: the most probable wrong class
    REG = (1.0000001 - p_y(x)) * sum over k of p_k(x) (log p_k(x) - log(p_k(x') + 1e-12))
    L   = mean(BCE) + beta * mean(REG)

In fp32 at least: in bf16 1.0000001 is 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arat_fast.config import MARTConfig
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import true_and_wrong, wide


def boosted_cross_entropy(adv: Tensor, labels: Tensor) -> Tensor:
    """BCE of adversarial logits (N, classes) in fp32 or wider, one value an image (N,)."""
    _, wrong = true_and_wrong(F.softmax(adv, 1), labels)
    return F.cross_entropy(adv, labels, reduction="none") - (1.0001 - wrong + 1e-12).log()


def weighted_divergence(clean: Tensor, adv: Tensor, labels: Tensor) -> Tensor:
    """REG of clean and adversarial logits (N, classes) in fp32 or wider, one value an image (N,)."""
    log_p = F.log_softmax(clean, 1)
    p = log_p.exp()
    true = p.gather(1, labels[:, None])[:, 0]
    log_q = (F.softmax(adv, 1) + 1e-12).log()
    return (1.0000001 - true) * (p * (log_p - log_q)).sum(1)


class MART(Method):
    """The published attack maximises CE from x + 0.001 normal noise, on running statistics."""

    name = "mart"
    plan = ("clean", "adv")

    def __init__(self, config: MARTConfig) -> None:
        super().__init__()
        self.config = config

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms bce and kl."""
        assert outputs.clean is not None
        assert outputs.adv is not None
        clean, adv = wide(outputs.clean), wide(outputs.adv)
        return {
            "bce": boosted_cross_entropy(adv, labels).mean(),
            "kl": self.config.beta * weighted_divergence(clean, adv, labels).mean(),
        }
