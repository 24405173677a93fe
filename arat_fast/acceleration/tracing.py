"""One module's own forward as a graph of calls, every submodule a leaf; refused where the graph could differ.

torch.fx runs the forward once on stand-ins for tensors. What it cannot see would silently be fixed as it was
in that run: random draws, attributes set, contexts such as no_grad, branches on types. Each of these is
looked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import CodeType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = ["NotTraceable", "required_arguments", "same", "trace"]

_EVERY_MODULES = frozenset(dir(nn.Module()))
_CONTAINERS = (dict, list, set)  # no unions: Dynamo reads `same`
_VALUES = (bool, int, float, str)


class NotTraceable(Exception):
    """Why a forward cannot be rewritten."""


class _Tracer(fx.Tracer):
    """Required arguments are placeholders, others have their defaults; submodules are never entered."""

    proxy_buffer_attributes = True  # else an update of a buffer would happen now

    def __init__(self) -> None:
        super().__init__()
        self._outside = _ambient()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = required_arguments(type(self.root))
        arguments = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return root_fn, [self.root, *arguments]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._outside:
            raise NotTraceable("a context such as torch.no_grad or autocast")
        return super().create_node(*args, **kwargs)


def trace(module: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of `module.forward` in train or eval mode, and the settings that it read.

    Raises NotTraceable with the reason.
    """
    cls = type(module)
    if "forward" in vars(module):
        raise NotTraceable("a forward of the instance, not of its class")
    if {"isinstance", "type", "issubclass"} & set(_names_used(cls)):
        raise NotTraceable("a branch on types")
    before, mode = _snapshot(module), module.training
    read: set[str] = set()
    try:
        with torch.enable_grad(), _no_random_draws(), _recording(module, read):
            module.training = training
            graph = _Tracer().trace(module)
    except NotTraceable:
        raise
    except Exception as error:  # whatever a stranger's code raises when it meets a stand-in
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotTraceable(f"control flow that torch.fx cannot follow ({first[:120]})") from None
    finally:
        module.training = mode
        changed = _restore(module, before)
    if any(name.startswith("_tensor_constant") for name in changed):
        raise NotTraceable("a tensor that is neither parameter nor buffer")
    if changed:
        raise NotTraceable(f"attributes set in the forward ({', '.join(sorted(changed))})")
    settings = {name: getattr(module, name) for name in read if not isinstance(vars(cls).get(name), property)}
    kept = {k: v for k, v in settings.items() if not isinstance(v, Tensor | nn.Module | MethodType)}
    return graph, {k: _shallow(v) for k, v in kept.items()}


@contextmanager
def _recording(module: nn.Module, read: set[str]) -> Iterator[None]:
    """Names of the attributes that are read, but for those that every module has."""
    cls = type(module)

    def getattribute(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name not in _EVERY_MODULES:
            read.add(name)
        return value

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": getattribute})
    try:
        yield
    finally:
        module.__class__ = cls


def required_arguments(cls: type[nn.Module]) -> list[str]:
    """Names of the forward's arguments without default. Raises NotTraceable for `*args`."""
    parameters = list(signature(cls.forward).parameters.values())[1:]
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        raise NotTraceable("a forward of any number of arguments")
    return [
        p.name for p in parameters if p.default is Parameter.empty and p.kind is not Parameter.VAR_KEYWORD
    ]


def _ambient() -> tuple[bool, ...]:
    autocast = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _names_used(cls: type[nn.Module]) -> Iterator[str]:
    """Names in the forward and in the methods of the class that it may call."""
    seen: set[CodeType] = set()
    todo: list[Any] = [vars(c)["forward"] for c in cls.__mro__ if "forward" in vars(c) and c is not nn.Module]
    while todo:
        code = getattr(todo.pop(), "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for name in code.co_names:
            yield name
            method = getattr(cls, name, None)
            if name not in vars(nn.Module) and hasattr(method, "__code__"):
                todo.append(method)


@contextmanager
def _no_random_draws() -> Iterator[None]:
    """Raises NotTraceable when a generator moved, after moving it back."""
    python, numpy, default = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    numpy_now: Any = np.random.get_state()
    same = all(np.array_equal(a, b) for a, b in zip(numpy, numpy_now, strict=True))  # type: ignore[arg-type]
    if not (same and random.getstate() == python and torch.equal(torch.get_rng_state(), default)):
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(default)
        raise NotTraceable("random draws")


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """The attributes; containers as shallow copies."""
    return {k: _shallow(v) for k, v in vars(module).items()}


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, _CONTAINERS) else value


def same(old: Any, new: Any) -> bool:
    """Whether a setting is what it was: the same object, an equal number or string, the same contents."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, _CONTAINERS):
        return len(old) == len(new) and all(a is b for a, b in zip(_items(old), _items(new), strict=True))
    return isinstance(old, _VALUES) and bool(old == new)


def _restore(module: nn.Module, before: dict[str, Any]) -> set[str]:
    """Undo what the forward set, and say what it was."""
    changed = set()
    for name in list(vars(module)):
        if name not in before:
            changed.add(name)
            del module.__dict__[name]
    for name, old in before.items():
        new = module.__dict__[name]
        if not (same(old, new) if isinstance(old, _CONTAINERS) else new is old):
            changed.add(name)
            module.__dict__[name] = old
    return changed


def _items(values: Any) -> list[Any]:
    return [*values, *values.values()] if isinstance(values, dict) else list(values)
