"""What an attack maximises, image by image.

    ce       -log p_y(x')                                  Madry et al. 2018
    margin   max over k != y of z_k(x'), less z_y(x')      Carlini and Wagner 2017
    kl       KL(p(x) || p(x')), p(x) a constant            Zhang et al. 2019 (TRADES)

Computed in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OBJECTIVES", "Objective"]

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) cross entropies of logits (N, classes) and int64 labels (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) best wrong logit less the true one: positive where the image is misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - true


def kl(logits: Tensor, clean_probabilities: Tensor) -> Tensor:
    """(N,) KL(p(x) || p(x')) of logits and the clean probabilities, both (N, classes)."""
    return F.kl_div(F.log_softmax(logits, 1), clean_probabilities, reduction="none").sum(1)


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "kl": kl, "margin": margin}
