"""Other forwards for modules that stay what they are: submodules, state_dict, methods, `isinstance`.

A module gets a subclass of its class whose `forward` is the faster one; `restore` gives the class back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .batch_norm import DropInBatchNorm2d
from .fusion import Fused, fuse
from .tracing import NotTraceable, required_arguments, trace

__all__ = ["fuse_forwards", "restore", "run_in_half"]

Forward = Callable[..., Any]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # without a forward: their parent calls what they hold


def fuse_forwards(model: nn.Module) -> tuple[Fused, dict[str, str]]:
    """Fuse ReLU and addition into the drop-in BNs of `model`: what took over what, and why others did not."""
    total, skipped = Fused(set(), set()), {}
    classes: dict[tuple[object, ...], type[nn.Module]] = {}
    for path, owner in _owners(model):
        try:
            fused = _fuse_forward(owner, classes)
        except NotTraceable as reason:
            name = path or "the model"
            skipped[name] = (
                f"BatchNorms replaced, not fused: the forward of {type(owner).__name__} has {reason}"
            )
            continue
        prefix = f"{path}." if path else ""
        total.relu.update(prefix + name for name in fused.relu)
        total.add.update(prefix + name for name in fused.add)
    return total, skipped


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose own forward calls a drop-in BN that could take more over."""

    def calls(module: nn.Module) -> bool:
        return any(
            type(child) is DropInBatchNorm2d or (isinstance(child, _CONTAINERS) and calls(child))
            for child in module.children()
        )

    for path, module in list(model.named_modules()):
        if not isinstance(module, _CONTAINERS) and calls(module):
            yield path, module


def _fuse_forward(owner: nn.Module, classes: dict[tuple[object, ...], type[nn.Module]]) -> Fused:
    """Give `owner` its fused forward. `classes` shares one class among equal modules, for compilers' sake."""
    cls = type(owner)
    graphs = [trace(owner, training) for training in (True, False)]
    results = [fuse(graph, owner) for graph in graphs]
    if results[0] != results[1]:
        raise NotTraceable("other BatchNorm calls in train than in eval mode")
    if not (results[0].relu or results[0].add):
        return results[0]
    sources = [graph.python_code("self").src for graph in graphs]
    key = (cls, *sources)
    if key not in classes:
        train, evaluate = (type(fx.GraphModule(owner, graph)).forward for graph in graphs)
        arguments = len(required_arguments(cls))
        classes[key] = _subclass(cls, _dispatch(cls, train, evaluate, arguments, sources[0] == sources[1]))
    owner.__class__ = classes[key]
    return results[0]


def _dispatch(cls: type[nn.Module], train: Forward, evaluate: Forward, arguments: int, same: bool) -> Forward:
    original = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The graph was traced with the defaults of all other arguments.
        if kwargs or len(args) != arguments:
            return original(self, *args, **kwargs)
        return train(self, *args) if same or self.training else evaluate(self, *args)

    return forward


def run_in_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Let `model` run under autocast to `dtype`; what it returns in half precision becomes float32."""
    original = type(model).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(p.device.type for p in self.parameters())
        with torch.autocast(device, dtype):
            output = original(self, *args, **kwargs)
        return tree_map(_widened, output)

    model.__class__ = _subclass(type(model), forward)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _subclass(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    # A code object of its own: compilers keep what they made of it by code object, and not for many models.
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    names = {"forward": own, "__module__": cls.__module__, "__doc__": cls.__doc__, "_plain_class": cls}
    return type(cls.__name__, (cls,), names)


def restore(model: nn.Module) -> None:
    """Give every module of `model` the class back that it had."""
    for module in model.modules():
        while "_plain_class" in vars(type(module)):
            module.__class__ = vars(type(module))["_plain_class"]
