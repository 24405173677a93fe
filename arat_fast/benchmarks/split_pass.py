"""Split BatchNorm in another project's model: a training pass of [clean; adv] through a converted ResNet-18.

    two passes  clean and adversarial images one after the other, a BatchNorm each, shared convolutions
    timm        timm.layers.convert_splitbn_model, where timm is installed
    ours        arat_fast.nn.convert_split_bn

All on torchvision's ResNet-18 (7x7 stem) in fp32, forward and backward, shown to give the same logits and
weight gradients.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.errors import TrainingError
from arat_fast.loaders.torchvision_import import torchvision
from arat_fast.nn import bn_mode, convert_split_bn, use_branch

TOLERANCE = 2e-2  # relative, of a weight's gradient: sums over the batch in another order, through 20 layers


class TwoPasses(nn.Module):
    """[clean; adv] through two networks that share all but their BatchNorms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.clean = model
        norms = {id(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        own = {id(p) for m in model.modules() if id(m) in norms for p in m.parameters()}
        shared = {id(p): p for p in model.parameters() if id(p) not in own}
        self.adv = copy.deepcopy(model, dict(shared))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of [clean; adv]."""
        clean, adv = x.chunk(2)
        return torch.cat([self.clean(clean), self.adv(adv)])


def _variants(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"ours": convert_split_bn(copy.deepcopy(model))}
    use_branch(found["ours"], "both")
    bn_mode(found["ours"], "batch", update=True)
    found["two passes"] = TwoPasses(copy.deepcopy(model))
    if importlib.util.find_spec("timm") is not None:
        layers: Any = importlib.import_module("timm.layers")
        found["timm"] = layers.convert_splitbn_model(copy.deepcopy(model), num_splits=2)
    return {name: variant.train() for name, variant in found.items()}


def passes(
    device: torch.device, batch: int, side: int
) -> tuple[dict[str, Callable[[], object]], Callable[[], None]]:
    """(a training pass of `batch` clean and as many other images by variant, a check that raises
    TrainingError).
    """
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    x = torch.rand(2 * batch, 3, side, side)
    labels = (torch.arange(2 * batch) % 10).to(device)
    variants = {name: variant.to(device) for name, variant in _variants(model).items()}
    images = {name: x.to(device) for name in variants}
    images["ours"] = images["ours"].contiguous(memory_format=torch.channels_last)

    def logits(name: str) -> Tensor:
        variant = variants[name]
        variant.zero_grad(set_to_none=True)
        result: Tensor = variant(images[name])
        F.cross_entropy(result, labels).backward()
        return result.detach()

    def check() -> None:
        found = {name: (logits(name), _stem_gradient(variants[name])) for name in variants}
        for name, values in found.items():
            for what, ours, expected in zip(("logits", "gradient"), values, found["two passes"], strict=True):
                error = float((ours - expected).norm() / expected.norm())
                if not error < TOLERANCE:
                    raise TrainingError(f"{name}: {what} differ by {error:.1e} from two passes'")

    def call(name: str) -> Callable[[], object]:
        return lambda: logits(name)

    return {name: call(name) for name in variants}, check


def _stem_gradient(model: nn.Module) -> Tensor:
    gradient = next(p for p in model.parameters() if p.ndim == 4).grad
    assert gradient is not None
    return gradient.detach()
