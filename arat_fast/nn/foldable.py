"""Which BN can be folded into which convolution, seen by running the model once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .fused_batch_norm import FusedBatchNorm2d
from .split_batch_norm import SplitBatchNorm2d

__all__ = ["foldable"]


class _Uses(TorchDispatchMode):
    """Follows convolution outputs to every operation that reads them.

    Comparing outputs would not do: a fresh BN is nearly the identity, and a wrong fold differs by 1e-6 at
    first.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used twice
        self.elsewhere: set[str] = set()
        self.inside: Tensor | None = None  # the input of the BN that runs now

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            if id(tensor) in self.outputs and tensor is not self.inside:
                self.elsewhere.add(self.outputs[id(tensor)][0])
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@torch.no_grad()
def foldable(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """(convolution, BN) names: the BN alone reads the output of the convolution; each runs once."""
    uses = _Uses()
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    hooks = []

    def watch_convolution(name: str, module: nn.Conv2d) -> None:
        def after(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            uses.outputs[id(output)] = (name, output)

        hooks.append(module.register_forward_hook(after))

    def watch_norm(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = args[0] if args else None
            found = uses.outputs.get(id(x))
            if found is not None:
                pairs.append((found[0], name))
                if any(other is x for other in _tensors((*args[1:], *kwargs.values()))):
                    uses.elsewhere.add(found[0])
            uses.inside = x

        def after(_module: nn.Module, _args: object, _output: object) -> None:
            uses.inside = None

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            watch_convolution(name, module)
        elif isinstance(module, SplitBatchNorm2d | FusedBatchNorm2d) or type(module) is nn.BatchNorm2d:
            watch_norm(name, module)
    try:
        with uses:
            model(example)
    finally:
        for handle in hooks:
            handle.remove()
    return [(conv, bn) for conv, bn in pairs if calls[conv] == calls[bn] == 1 and conv not in uses.elsewhere]
