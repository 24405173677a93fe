"""Networks of the fast path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from arat_fast.errors import unknown_name
from arat_fast.models.cifar import ResNet, WideResNet
from arat_fast.models.imagenet import PhotoResNet
from arat_fast.models.library import LIBRARIES, create_library_model, is_library_name
from arat_fast.nn import bind_branches

BRANCHES = ("clean", "adv")


def _resnet(
    widths: Sequence[int], blocks: Sequence[int], full_size: int = 1
) -> Callable[[int, int, Sequence[str]], nn.Module]:
    def build(num_classes: int, in_channels: int, branches: Sequence[str]) -> nn.Module:
        return ResNet(
            widths,
            blocks,
            num_classes=num_classes,
            in_channels=in_channels,
            branches=branches,
            full_size=full_size,
        )

    return build


def _wide(depth: int, widen: int) -> Callable[[int, int, Sequence[str]], nn.Module]:
    def build(num_classes: int, in_channels: int, branches: Sequence[str]) -> nn.Module:
        return WideResNet(depth, widen, num_classes=num_classes, in_channels=in_channels, branches=branches)

    return build


def _photo(blocks: Sequence[int], bottleneck: bool) -> Callable[[int, int, Sequence[str]], nn.Module]:
    def build(num_classes: int, in_channels: int, branches: Sequence[str]) -> nn.Module:
        return PhotoResNet(
            blocks, bottleneck, num_classes=num_classes, in_channels=in_channels, branches=branches
        )

    return build


MODELS = {
    "resnet8": _resnet((16, 32, 64), (1, 1, 1)),
    "resnet18": _resnet((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet18-lbgat": _resnet((64, 128, 256, 512), (2, 2, 2, 2), full_size=2),
    "wrn-34-10": _wide(34, 10),
    "resnet18-imagenet": _photo((2, 2, 2, 2), bottleneck=False),
    "resnet50-imagenet": _photo((3, 4, 6, 3), bottleneck=True),
}


def create_model(
    name: str, num_classes: int = 10, in_channels: int = 3, branches: Sequence[str] = BRANCHES
) -> nn.Module:
    """A channels-last network with split BatchNorm; one branch name makes it an ordinary one.

    name: of `MODELS`, or `torchvision/NAME` and `timm/NAME`: the library's network, accelerated.

    Raises UserError for an unknown name, with the nearest known one, and for several branches of a network
    without BatchNorm2d.
    """
    if is_library_name(name):
        return create_library_model(name, num_classes, in_channels, branches)
    if name not in MODELS:
        raise unknown_name("model", name, [*MODELS, *(f"{library}/NAME" for library in LIBRARIES)])
    model = MODELS[name](num_classes, in_channels, branches)
    bind_branches(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
