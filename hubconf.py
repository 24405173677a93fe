"""`torch.hub.load("OWNER/arat-fast", NAME, …)`, or `torch.hub.load(CHECKOUT, NAME, …, source="local")`.

Networks with split BatchNorm (`resnet18`, `wrn_34_10`, `resnet8`), and for any model `pgd` and `accelerate`.
Nothing needs to be installed but the packages named in `dependencies`.
"""

import importlib.util as _importlib_util
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path
from typing import Any as _Any

from torch import nn as _nn

import arat_fast as _arat_fast

dependencies = ["torch", "triton", "numpy"]

# In a checkout kernels/ and loaders/ lie at the top; installed, they are arat_fast.kernels and .loaders.
if _importlib_util.find_spec("arat_fast.kernels") is None:
    _arat_fast.__path__.append(str(_Path(__file__).resolve().parent))


def _network(
    name: str, num_classes: int, in_channels: int, branches: _Sequence[str], weights: str | None
) -> _nn.Module:
    from arat_fast.models.weights import load_weights

    model = _arat_fast.create_model(name, num_classes, in_channels, branches).eval()
    return model if weights is None else load_weights(model, weights)


def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    branches: _Sequence[str] = ("clean", "adv"),
    weights: str | None = None,
) -> _nn.Module:
    """CIFAR ResNet-18 (3x3 stem, no max-pool) for images in [0, 1], channels-last, in eval mode.

    branches: of the split BatchNorms; one name makes it an ordinary network. The last one is in use at first.
    weights: file of a run (last.pt), of an export, of the ARAT authors' code, or of a plain network.
    """
    return _network("resnet18", num_classes, in_channels, branches, weights)


def wrn_34_10(
    num_classes: int = 10,
    in_channels: int = 3,
    branches: _Sequence[str] = ("clean", "adv"),
    weights: str | None = None,
) -> _nn.Module:
    """Wide ResNet-34-10 (Zagoruyko and Komodakis 2016) for CIFAR; arguments as `resnet18`."""
    return _network("wrn-34-10", num_classes, in_channels, branches, weights)


def resnet8(
    num_classes: int = 10,
    in_channels: int = 3,
    branches: _Sequence[str] = ("clean", "adv"),
    weights: str | None = None,
) -> _nn.Module:
    """CIFAR ResNet-8, for trials; arguments as `resnet18`."""
    return _network("resnet8", num_classes, in_channels, branches, weights)


def pgd(model: _nn.Module, **options: _Any) -> _Any:
    """`attack = pgd(model, eps=8/255, alpha=2/255, steps=10)`; then `x_adv = attack(images, labels)`.

    Options are those of `arat_fast.PGD`.
    """
    return _arat_fast.PGD(model, **options)


def accelerate(model: _nn.Module, **options: _Any) -> _nn.Module:
    """The model made faster in place; options are those of `arat_fast.accelerate`."""
    return _arat_fast.accelerate(model, **options)
