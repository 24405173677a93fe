"""A copy of a network that follows what is set on the original by hand: a dropout rate, a temperature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from torch import nn

__all__ = ["follow_settings", "settings"]

_PLAIN = (bool, int, float, str, NoneType)
# PyTorch's own; the mode is each copy's matter.
_NOT_SETTINGS = ("training", "_is_full_backward_hook", "_compiled_call_impl")


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of a layer's own numbers, texts and switches."""
    for name, value in vars(module).items():
        if type(value) in _PLAIN and name not in _NOT_SETTINGS:
            yield name, value


def follow_settings(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Set on each copy what its original, the second of the pair, has now."""
    for copy, original in pairs:
        own = vars(copy)
        for name, value in settings(original):
            if name not in own or own[name] != value:
                setattr(copy, name, value)
