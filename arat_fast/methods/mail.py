"""MAIL (Wang et al., NeurIPS 2021): images near the decision boundary weigh more in AT, TRADES or MART.

    w_i = 3 sigmoid(slope * (p_k*(x'_i) - p_y(x'_i) + bias))     detached; k*: the most probable wrong class
    MAIL-AT     mean(w CE(x'))
    MAIL-TRADES CE(x) + beta * mean(w KL(p(x) ‖ p(x')))
    MAIL-MART   mean(w BCE) + beta * mean(REG)                   BCE and REG as in MART

Before `start_epoch` every w is 1, or, with warm_up "at", the loss is CE(x') and x' alone is forwarded.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_fast.config import MAILConfig, published_mail
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import kl_from_clean, true_and_wrong, wide
from arat_fast.methods.mart import boosted_cross_entropy, weighted_divergence


class MAIL(Method):
    """`kind`: what is weighed. `phase` is 0 before the start epoch and 1 from it on."""

    phase: Tensor

    def __init__(self, kind: Literal["at", "trades", "mart"], config: MAILConfig) -> None:
        super().__init__()
        self.kind = kind
        self.name = f"mail-{kind}"
        self.config = published_mail(config, self.name)
        self.register_buffer("phase", torch.zeros(()), persistent=False)
        self._plan_for(False)

    def on_epoch_start(self, epoch: int, rate_factor: float) -> None:
        """Let the weights apply from the start epoch on; after a warm-up "at" the plan changes then."""
        started = epoch >= self.config.start_epoch
        self.phase.fill_(float(started))
        self._plan_for(started)

    def _plan_for(self, started: bool) -> None:
        alone = self.kind == "at" or (self.config.warm_up == "at" and not started)
        self.plan = ("adv",) if alone else ("clean", "adv")

    def weights(self, adv: Tensor, labels: Tensor) -> Tensor:
        """w of adversarial logits (N, classes) in fp32 or wider: (N,), all 1 before the start epoch."""
        slope, bias = self.config.slope, self.config.bias
        assert slope is not None
        assert bias is not None
        true, wrong = true_and_wrong(F.softmax(adv.detach(), 1), labels)
        return 1 + self.phase * (3 * torch.sigmoid(slope * (wrong - true + bias)) - 1)

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms ce_adv; ce_clean and kl; or bce and kl; ce_adv alone in a warm-up "at"."""
        assert outputs.adv is not None
        adv, beta = wide(outputs.adv), self.config.beta
        w = self.weights(adv, labels)
        if self.plan == ("adv",):
            return {"ce_adv": (w * F.cross_entropy(adv, labels, reduction="none")).mean()}
        assert outputs.clean is not None
        clean = wide(outputs.clean)
        if self.kind == "trades":
            return {
                "ce_clean": F.cross_entropy(clean, labels),
                "kl": beta * (w * kl_from_clean(clean, adv)).mean(),
            }
        return {
            "bce": (w * boosted_cross_entropy(adv, labels)).mean(),
            "kl": beta * weighted_divergence(clean, adv, labels).mean(),
        }
