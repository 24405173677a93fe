"""Other forwards for modules that stay what they are: a subclass of their class has the faster one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .classes import subclass
from .fusion import FUSABLE, Fused, fuse
from .tracing import NotTraceable, required_arguments, same, trace

__all__ = ["fuse_forwards", "run_with"]

Forward = Callable[..., Any]
VIEW_NOTE = (
    "accelerate keeps activations channels-last, and .view cannot flatten those: write x.flatten(1) or "
    "x.reshape(...) in its place, or accelerate(model, channels_last=False)"
)
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
            type(child) in FUSABLE or (isinstance(child, _CONTAINERS) and calls(child))
            for child in module.children()
        )

    for path, module in list(model.named_modules()):
        if not isinstance(module, _CONTAINERS) and calls(module):
            yield path, module


@dataclass(frozen=True)
class _Traced:
    """What a fused forward rests on: settings that were read, and the modules that it leaves out or fuses."""

    settings: dict[str, Any]
    modules: dict[str, type]

    def holds(self, module: nn.Module) -> bool:
        return all(same(value, getattr(module, name, None)) for name, value in self.settings.items()) and all(
            type(_inside(module, name)) is kind for name, kind in self.modules.items()
        )


def _inside(module: nn.Module | None, path: str) -> nn.Module | None:
    """The submodule, None where there is none; `get_submodule` takes ten times as long, at every call."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _fuse_forward(owner: nn.Module, classes: dict[tuple[object, ...], type[nn.Module]]) -> Fused:
    """Give `owner` its fused forward. `classes` shares one class among equal modules, for compilers' sake."""
    cls = type(owner)
    traced = [trace(owner, training) for training in (True, False)]
    graphs = [graph for graph, _ in traced]
    called = [_called(graph) for graph in graphs]
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
        forward = _dispatch(cls, train, evaluate, arguments, sources[0] == sources[1])
        classes[key] = _subclass(cls, forward, _fuse_again)
    gone = {name for names, graph in zip(called, graphs, strict=True) for name in names - _called(graph)}
    names = sorted(gone | results[0].relu | results[0].add)
    owner.__class__ = classes[key]
    owner.__dict__["_traced"] = _Traced(
        traced[0][1] | traced[1][1], {name: type(owner.get_submodule(name)) for name in names}
    )
    return results[0]


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _fuse_again(owner: nn.Module) -> None:
    with suppress(NotTraceable):
        _fuse_forward(owner, {})


def _dispatch(
    cls: type[nn.Module], train: Forward, evaluate: Forward, arguments: int, alike: bool
) -> Forward:
    original = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The graph was traced with the defaults of all other arguments, and the settings of then.
        if kwargs or len(args) != arguments or not vars(self)["_traced"].holds(self):
            return original(self, *args, **kwargs)
        return train(self, *args) if alike or self.training else evaluate(self, *args)

    return forward


def run_with(model: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> None:
    """Let `model` run under autocast to `dtype`, what it returns in half precision becoming float32.

    channels_last: say of errors of `.view` what they come from.
    """
    original = type(model).forward

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self, *args, **kwargs)
        device = next((p.device.type for p in self.parameters()), None) or _device(args)
        with torch.autocast(device, dtype):
            output = original(self, *args, **kwargs)
        return tree_map(_widened, output)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not channels_last or torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        try:
            return run(self, *args, **kwargs)
        except RuntimeError as error:
            if "view size is not compatible" in str(error):
                error.add_note(VIEW_NOTE)
            raise

    again = functools.partial(run_with, dtype=dtype, channels_last=channels_last)
    model.__class__ = _subclass(type(model), forward, again)


def _device(args: tuple[Any, ...]) -> str:
    """For DataParallel's replicas, which have no parameters."""
    return next((value.device.type for value in args if isinstance(value, Tensor)), "cpu")


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _subclass(cls: type[nn.Module], forward: Forward, again: Callable[[nn.Module], None]) -> type[nn.Module]:
    # A code object of its own: compilers keep what they made of it by code object, and not for many models.
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    functools.update_wrapper(own, cls.forward)  # for inspect.signature
    return subclass(cls, again, {"forward": own})
