"""Networks of torchvision and timm by name: `torchvision/resnet34`, `timm/resnet26`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from arat_fast.acceleration import accelerate
from arat_fast.errors import UserError
from arat_fast.models.imagenet import invariance_layers

__all__ = [
    "LIBRARIES",
    "build_library_model",
    "create_library_model",
    "is_library_name",
    "library_model_names",
]

LIBRARIES = ("torchvision", "timm")
_WITH_SIDE_OUTPUTS = ("googlenet", "inception_v3")  # of which train mode returns tuples


def is_library_name(name: str) -> bool:
    """Whether `name` is of the form LIBRARY/MODEL."""
    return name.partition("/")[0] in LIBRARIES and "/" in name


def library_model_names(library: str) -> list[str]:
    """Classifiers that the library builds by name. Raises UserError where timm is not installed."""
    if library == "timm":
        return list(_timm().list_models())
    models = _torchvision_models()
    return list(models.list_models(module=models))


def build_library_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """The library's own network with freshly drawn weights, taking pixels in [0, 1] as they are.

    Raises UserError for an unknown name, with the nearest known one, and for a number of channels that the
    library does not build.
    """
    library, _, rest = name.partition("/")
    known = library_model_names(library)
    if rest not in known:
        near = difflib.get_close_matches(rest, known, n=5, cutoff=0.5)
        hint = f"; the nearest are {', '.join(f'{library}/{each}' for each in near)}" if near else ""
        raise UserError(f"unknown model {name!r}: {library} has {len(known)} others{hint}")
    if library == "timm":
        model = _timm().create_model(rest, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    else:
        if in_channels != 3:
            raise UserError(f"{name} takes images of 3 channels, not {in_channels}; timm's networks take any")
        options = {"aux_logits": False} if rest in _WITH_SIDE_OUTPUTS else {}
        model = _torchvision_models().get_model(rest, weights=None, num_classes=num_classes, **options)
    assert isinstance(model, nn.Module)
    return model


def create_library_model(name: str, num_classes: int, in_channels: int, branches: Sequence[str]) -> nn.Module:
    """The library's network, accelerated: split BatchNorm with these branches, fused where it can be.

    One branch leaves a network without BatchNorm2d as it is; more raise UserError, as do unknown names.
    """
    model = build_library_model(name, num_classes, in_channels)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        try:
            accelerate(model, split_bn=tuple(branches), precision="fp32")
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    elif len(branches) > 1:
        raise UserError(
            f"{name} has no BatchNorm2d to split for {' and '.join(branches)} images; choose another method, "
            "or --arat.no-split-bn"
        )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.invariance_layers = invariance_layers(model)  # type: ignore[assignment]
    return model


def _torchvision_models() -> Any:
    from arat_fast.loaders.torchvision_import import torchvision

    return torchvision.models


def _timm() -> Any:
    from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401  timm imports it as it is

    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed: pip install 'arat-fast[timm]'") from None
    return timm
