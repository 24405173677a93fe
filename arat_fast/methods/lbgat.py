"""LBGAT (Cui et al., ICCV 2021): the adversarial logits follow the clean logits of a teacher trained along.

    L = MSE(f(x'), g(x)) + CE(g(x), y) + beta * KL(p_f(x) ‖ p_f(x'))

g has BatchNorms of its own and is trained by the same optimizer; nothing is detached. The published attack is
TRADES' on the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.config import LBGATConfig
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import kl_from_clean, wide


class LBGAT(Method):
    """teacher: a network of `arat_fast.models` with one BatchNorm branch; logits (N, classes).

    Without beta the student's clean logits are not needed. The published code forwards the clean images all
    the same, and so moves the running statistics; with `clean_statistics` one forward without gradient does.
    """

    name = "lbgat"

    def __init__(self, config: LBGATConfig, teacher: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher
        self.plan = ("clean", "adv") if config.beta else ("adv",)
        self.repeats_clean = config.clean_statistics and not config.beta

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms mse, ce_teacher and, with beta, kl."""
        assert outputs.adv is not None
        assert outputs.images is not None
        with torch.autocast(outputs.images.device.type, self.compute, enabled=self.compute.itemsize == 2):
            teacher = wide(self.teacher(outputs.images))
        adv = wide(outputs.adv)
        terms = {
            "mse": F.mse_loss(adv, teacher),
            "ce_teacher": F.cross_entropy(teacher, labels),
        }
        if self.config.beta:
            assert outputs.clean is not None
            terms["kl"] = self.config.beta * kl_from_clean(wide(outputs.clean), adv).mean()
        return terms
