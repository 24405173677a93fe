"""What a GPU punishes and the interpreter, which runs one program after the other, forgives.

`watch_launches()` makes every interpreted launch an error (`LaunchError`) in which
- a program reads or writes an element that another program writes: programs run in any order;
- a program reads back what it wrote: its threads do not wait for each other's stores;
- two lanes of one store write different values to one element;
- an element outside the launch's tensors is read or written. A tensor of int64 addresses lets in what it
  names: a row each of two sides' addresses and one of sizes in bytes, as `CopyWhere` makes it.
Masked lanes do not count. Atomics, which no kernel here has, are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Addresses = NDArray[np.int64]


class LaunchError(AssertionError):
    """A launch whose result on a GPU is left to chance."""


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _extents(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    found = []
    for tensor in tensors:
        found.append(_extent(tensor))
        if tensor.dtype == torch.int64 and tensor.ndim == 2 and tensor.shape[0] == 3:
            for target, source, size in tensor.T.tolist():
                found += [(target, target + size), (source, source + size)]
    return found


class _Launch:
    """The bytes that the programs of one launch read and wrote."""

    def __init__(self, kernel: str, tensors: Iterable[Tensor]) -> None:
        self.kernel = kernel
        starts, ends = np.array(sorted(_extents(tensors)), dtype=np.int64).reshape(-1, 2).T
        self.starts, self.ends = starts, np.maximum.accumulate(ends) if len(ends) else ends
        self.program = -1
        self.own: list[Addresses] = []  # what the running program has stored so far
        self.loads: list[tuple[int, Addresses]] = []
        self.stores: list[tuple[int, Addresses]] = []

    def begin(self, program: int) -> None:
        self.program, self.own = program, []

    def _inside(self, addresses: Addresses, size: int, what: str) -> None:
        last = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (last < 0) | (addresses + size > self.ends[last])
        if bad.any():
            raise LaunchError(
                f"{self.kernel}: program {self.program} {what} {int(bad.sum())} elements of {size} bytes "
                "outside its tensors"
            )

    def _bytes(self, pointers: Any, mask: Any, size: int, what: str) -> Addresses:
        chosen = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[chosen].astype(np.int64)
        self._inside(addresses, size, what)
        return (addresses[:, None] + np.arange(size)).ravel()

    def load(self, pointers: Any, mask: Any, size: int) -> None:
        found = self._bytes(pointers, mask, size, "reads")
        if self.own and np.isin(found, np.concatenate(self.own)).any():
            raise LaunchError(f"{self.kernel}: program {self.program} reads back what it wrote")
        self.loads.append((self.program, np.unique(found)))

    def store(self, pointers: Any, mask: Any, values: Any) -> None:
        size = values.dtype.itemsize
        found = self._bytes(pointers, mask, size, "writes")
        order = np.argsort(found, kind="stable")
        twice = np.flatnonzero(np.diff(found[order]) == 0)
        if len(twice):
            chosen = np.ascontiguousarray(values[np.broadcast_to(mask, pointers.shape).astype(bool)])
            stored = chosen.view(np.uint8).ravel()[order]
            if (stored[twice] != stored[twice + 1]).any():
                raise LaunchError(f"{self.kernel}: two lanes of one store write different values")
        found = np.unique(found)
        self.own.append(found)
        self.stores.append((self.program, found))

    def end(self) -> None:
        """Compare what the programs did."""
        if not self.stores:
            return
        written = np.concatenate([found for _, found in self.stores])
        writer = np.concatenate([np.full(len(found), program) for program, found in self.stores])
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        if ((np.diff(written) == 0) & (np.diff(writer) != 0)).any():
            raise LaunchError(f"{self.kernel}: two programs write one element")
        for program, found in self.loads:
            at = np.minimum(np.searchsorted(written, found), len(written) - 1)
            if ((written[at] == found) & (writer[at] != program)).any():
                raise LaunchError(f"{self.kernel}: program {program} reads what another one writes")


def watch_launches() -> None:
    """Check every launch of this process from now on."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    running: list[_Launch] = []

    def watched_load(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            result = original(self, pointers, mask, *rest, **options)
            running[-1].load(pointers.data, mask.data, result.data.dtype.itemsize)
            return result

        return load

    def watched_store(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            running[-1].store(pointers.data, mask.data, value.data)
            return original(self, pointers, value, mask, *rest, **options)

        return store

    def watched_program(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
            original(self, x, y, z)
            _, ny, nz = self.grid_dim
            running[-1].begin((x * ny + y) * nz + z)

        return set_grid_idx

    def watched_launch(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            running.append(_Launch(self.fn.__name__, tensors))
            try:
                original(self, *args, **kwargs)
                running[-1].end()
            finally:
                running.pop()

        return launch

    def no_atomics(self: Any, *args: Any, **options: Any) -> Any:
        raise LaunchError("atomics: these checks do not know their order")

    builder.create_masked_load = watched_load(builder.create_masked_load)
    builder.create_masked_store = watched_store(builder.create_masked_store)
    builder.create_atomic_rmw = builder.create_atomic_cas = no_atomics
    builder.set_grid_idx = watched_program(builder.set_grid_idx)
    executor.__call__ = watched_launch(executor.__call__)
