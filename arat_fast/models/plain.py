"""Every model in plain PyTorch: what checkpoints hold, evaluation runs, and the reference engine trains.

CIFAR's are `arat_fast.reference`'s own. The others are torchvision's and timm's networks themselves, their
BatchNorms replaced by the reference's pair of BatchNorms where branches are split.
"""

from __future__ import annotations

import copy

from torch import nn

from arat_fast import reference
from arat_fast.errors import UserError, unknown_name
from arat_fast.models.imagenet import invariance_layers
from arat_fast.models.library import LIBRARIES, build_library_model, is_library_name

__all__ = ["PHOTO_MODELS", "check_model", "model_names", "plain_network"]

PHOTO_MODELS = {"resnet18-imagenet": "torchvision/resnet18", "resnet50-imagenet": "torchvision/resnet50"}


def model_names() -> list[str]:
    """Names of this project's own models."""
    return [*reference.MODELS, *PHOTO_MODELS]


def check_model(name: str) -> None:
    """Raise UserError with the nearest known name unless `name` is a model, or of the form LIBRARY/NAME."""
    if name not in model_names() and not is_library_name(name):
        raise unknown_name("model", name, [*model_names(), *(f"{library}/NAME" for library in LIBRARIES)])


def plain_network(name: str, num_classes: int, in_channels: int, split_bn: bool) -> nn.Module:
    """The named network with freshly drawn weights; `split_bn`: a BatchNorm for clean and one for adv images.

    Raises UserError for an unknown name, and for split_bn of a network without BatchNorm2d.
    """
    check_model(name)
    if name in reference.MODELS:
        return reference.MODELS[name](num_classes, in_channels, split_bn)
    if name in PHOTO_MODELS:
        model = build_library_model(PHOTO_MODELS[name], num_classes, 3)
        if in_channels != 3:
            model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    else:
        model = build_library_model(name, num_classes, in_channels)
    if split_bn and not _split_in_place(model):
        raise UserError(f"{name} has no BatchNorm2d to split; choose another method, or --arat.no-split-bn")
    model.invariance_layers = invariance_layers(model)  # type: ignore[assignment]
    return model


def _split_in_place(parent: nn.Module) -> int:
    """Replace every BatchNorm2d below `parent`; how many there were."""
    count = 0
    for name, child in parent.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = reference.SplitBatchNorm2d(child.num_features)
            split.clean, split.adv = child, copy.deepcopy(child)
            setattr(parent, name, split)
            count += 1
        else:
            count += _split_in_place(child)
    return count
