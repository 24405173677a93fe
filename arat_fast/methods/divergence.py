"""What several losses share: KL(p(x) ‖ p(x')) by image, and the most probable wrong class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """The values in fp32, or float64 where they are: constants like 1e-12 do not survive in less."""
    return values if values.dtype is torch.float64 else values.float()


def kl_from_clean(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(p(x) ‖ p(x')) of logits (N, classes), in fp32 or wider, one value an image (N,).

    Gradients flow to both.
    """
    p, q = F.log_softmax(clean, 1), F.log_softmax(adv, 1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def true_and_wrong(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of probabilities (N, classes): the true class's, and the most probable wrong class's, (N,) each."""
    true = probabilities.gather(1, labels[:, None])[:, 0]
    wrong = probabilities.scatter(1, labels[:, None], -torch.inf).max(1).values
    return true, wrong
