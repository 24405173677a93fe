"""ARAT: asymmetrically representation-regularised adversarial training (Waseda, Chang, Echizen, ICLR 2025).

    L = a CE(c', y) + (1 - a) CE(c, y) + gamma / |S| * sum over l in S of Dist(h_l(z'_l), stop-gradient(z_l))

c, z: logits and tapped features of the clean images through the clean branch; c', z': of the adversarial ones
through the adv branch; h_l: a predictor MLP; a: the clean branch's accuracy, set once an epoch.
`arat_fast.reference` is the specification that this file is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.config import ARATConfig
from arat_fast.methods.base import Method, Outputs


def predictor(dim: int) -> nn.Sequential:
    """h: Linear(d, d/4) - BatchNorm1d - ReLU - Linear(d/4, d)."""
    hidden = dim // 4
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
    )


def distance(prediction: Tensor, target: Tensor, kind: str, temperature: float) -> Tensor:
    """Dist(prediction, target) of two (N, d) features, averaged over the batch: cosine, mse or kl."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=1).mean()
    if kind == "mse":
        return F.mse_loss(prediction, target)
    log_p = F.log_softmax(prediction / temperature, dim=1)
    log_t = F.log_softmax(target / temperature, dim=1)
    return F.kl_div(log_p, log_t, reduction="batchmean", log_target=True) * temperature**2


class ARAT(Method):
    """The loss with the paper's ablations as switches; dims: feature width of each tapped layer, in order."""

    name = "arat"
    plan = ("clean", "adv")

    def __init__(self, config: ARATConfig, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.branches = ("clean", "adv") if config.split_bn else ("adv",)
        self.taps = () if config.invariance == "none" else tuple(dims)
        # A list in the order of `taps`: module names cannot hold the dots of layer names.
        self.predictors = nn.ModuleList(
            predictor(dims[name]) if config.predictor else nn.Identity() for name in self.taps
        )
        self.register_buffer("a", torch.tensor(0.5))
        self.a: Tensor
        self.register_buffer("gamma", torch.tensor(config.gamma), persistent=False)
        self.gamma: Tensor

    def _invariance(self, adv: Tensor, clean: Tensor, h: nn.Module) -> Tensor:
        form = self.config.invariance

        def dist(prediction: Tensor, target: Tensor) -> Tensor:
            return distance(prediction, target, self.config.distance, self.config.temperature)

        if form == "symmetric":
            return dist(h(adv), clean)
        if form == "target-only":
            return dist(h(adv.detach()), clean)
        one_way = dist(h(adv), clean.detach())
        return one_way if form == "stopgrad" else (one_way + dist(clean, adv.detach())) / 2

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Terms ce_adv, ce_clean and invariance."""
        assert outputs.clean is not None
        assert outputs.adv is not None
        weight_adv, weight_clean = (self.a, 1 - self.a) if self.config.auto_balance else (1.0, 1.0)
        terms = {
            "ce_adv": weight_adv * F.cross_entropy(outputs.adv, labels),
            "ce_clean": weight_clean * F.cross_entropy(outputs.clean, labels),
        }
        if self.taps:
            each = [
                self._invariance(outputs.taps_adv[name], outputs.taps_clean[name], h)
                for name, h in zip(self.taps, self.predictors, strict=True)
            ]
            terms["invariance"] = self.gamma * torch.stack(each).mean()
        return terms
