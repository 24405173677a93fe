"""Modules made subclasses of what they are: submodules, state_dict, methods and `isinstance` stay.

`restore` gives the class back. Copies have the subclass too. A pickle holds the plain class, for the subclass
has no name to be found by, and makes the module anew when it is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["restore", "subclass"]

Again = Callable[[nn.Module], None]


def subclass(cls: type[nn.Module], again: Again, names: dict[str, Any], *mixins: type) -> type[nn.Module]:
    """A subclass of `cls` with these attributes; `again` makes one of a loaded module."""
    own = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "_plain_class": cls,
        "_again": staticmethod(again),
    }
    return type(cls.__name__, (*mixins, cls), own | names)


def restore(model: nn.Module) -> None:
    """Give every module of `model` the class back that it had."""
    for module in model.modules():
        while "_plain_class" in vars(type(module)):
            module.__class__ = vars(type(module))["_plain_class"]


@contextmanager
def _as_plain(module: nn.Module) -> Iterator[type[nn.Module]]:
    cls = type(module)
    plain: type[nn.Module] = vars(cls)["_plain_class"]
    module.__class__ = plain
    try:
        yield plain
    finally:
        module.__class__ = cls


def _copied(module: nn.Module, copier: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with _as_plain(module) as plain:
        new = copier(module)
    if type(new) is plain:
        new.__class__ = type(module)
    return new


def _copy(module: nn.Module) -> nn.Module:
    return _copied(module, copy.copy)


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    return _copied(module, lambda plain: copy.deepcopy(plain, memo))


def _reduce(module: nn.Module, protocol: Any) -> str | tuple[Any, ...]:
    again = vars(type(module))["_again"].__func__
    with _as_plain(module):
        reduced = module.__reduce_ex__(protocol)
    if isinstance(reduced, str):
        return reduced
    make, arguments, *rest = reduced
    rest += [None] * (4 - len(rest))
    # Pickle would check that copyreg's __newobj__ gets the module's own class; _call it leaves alone.
    return _call, (make, *arguments), *rest[:3], partial(_set_state, rest[3], again)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _set_state(inner: Callable[[nn.Module, Any], None] | None, again: Again, module: Any, state: Any) -> None:
    if inner is None:
        module.__setstate__(state)
    else:
        inner(module, state)
    again(module)
