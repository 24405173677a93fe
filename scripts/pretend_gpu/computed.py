"""The numbers of a pretended GPU: each operator is computed on the CPU, in the memory of its CUDA tensors.

At once, or, where a capture records it, each time the graph is replayed: from the addresses that it was
recorded with, as a GPU would. So a replay that reads what has since moved, or a number that Python has
changed, is found out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Of these nothing is to be computed, or CUDA's own implementation reads memory and is right.
LEFT = {aten.detach, aten._local_scalar_dense, aten.record_stream, aten.is_pinned, aten._pin_memory}
LEFT |= {torch.ops.prim.device}
ALLOCATE = ("aten.empty", "aten.new_empty", "aten.set_", "aten.resize_")
VALUES_SHAPE_THEM = (aten.nonzero, aten.masked_select, aten._unique2, aten.equal)
MASKS_SHAPE_THEM = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)

recording: list[Callable[[], None]] | None = None


def in_host_memory(value: Any) -> Any:
    """A CUDA tensor as a CPU tensor of the same memory; other arguments as the CPU's operators take them."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    of_bytes = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    where = value.storage_offset(), value.shape, value.stride()
    return torch.empty(0, dtype=value.dtype).set_(of_bytes, *where)


def _cudnn_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Any:
    return torch.native_batch_norm(x, weight, bias, *rest)


def _cudnn_batch_norm_backward(x: Tensor, dy: Tensor, weight: Tensor, *rest: Any) -> Any:
    *statistics, eps, _ = rest
    return aten.native_batch_norm_backward(dy, x, weight, *statistics, True, eps, [True] * 3)


ON_THE_CPU = {
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.cudnn_batch_norm_backward.default: _cudnn_batch_norm_backward,
}


def _store(results: list[Any], places: list[Any]) -> None:
    from arat_fast.kernels.split_batch_norm_reference import pack_bits

    for result, place in zip(results, places, strict=False):
        if not isinstance(result, Tensor) or result is place:
            continue
        if result.numel() == place.numel():
            place.copy_(result.view(place.shape))
        elif not result.numel() and place.dtype is torch.uint8 and place.ndim == 2:
            # Where ReLU let through: bits on a GPU, on the CPU y itself.
            y = results[0]
            place.copy_(pack_bits(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]) > 0))


def shaped_by_values(func: Any, args: Any) -> bool:
    """Whether CUDA's implementation reads, half-way, how large its result is: here no kernel has counted."""
    if func.overloadpacket in MASKS_SHAPE_THEM:
        return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return func.overloadpacket in VALUES_SHAPE_THEM


class Computed(TorchDispatchMode):
    """Calls every operator twice: on CUDA, which allocates and launches, and on the CPU, which computes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in given)
        if on_gpu and shaped_by_values(func, args):
            found = func(*tree_map(in_host_memory, args), **tree_map(in_host_memory, kwargs))
            if func._schema.is_mutable:
                return args[0]  # changed, in the same memory
            return tree_map(lambda t: t.cuda() if isinstance(t, Tensor) else t, found)
        generators = [g for g in given if isinstance(g, torch.Generator) and g.device.type == "cuda"]
        seeds = [hash((g.initial_seed(), 0 if recording is not None else g.get_offset())) for g in generators]
        made = func(*args, **kwargs)
        places = tree_leaves(made)
        on_gpu = on_gpu or any(isinstance(t, Tensor) and t.is_cuda for t in places)
        if not on_gpu or func.is_view or func.overloadpacket in LEFT or str(func).startswith(ALLOCATE):
            return made
        own_args, own_kwargs = tree_map(in_host_memory, (args, kwargs))
        own_kwargs.pop("pin_memory", None)
        if generators:
            own_kwargs["generator"] = torch.Generator().manual_seed(seeds[0] % 2**60)
        inputs = {id(t) for t in given if isinstance(t, Tensor)}
        # What was changed in place has been, in the same memory.
        own_places = [None if id(t) in inputs else in_host_memory(t) for t in places]

        def compute() -> None:
            results = tree_leaves(ON_THE_CPU.get(func, func)(*own_args, **own_kwargs))
            pairs = [(r, p) for r, p in zip(results, own_places, strict=False) if p is not None]
            _store([r for r, _ in pairs], [p for _, p in pairs])

        if recording is None:
            compute()
        else:
            recording.append(compute)
        return made


def install() -> None:
    """From now on, in this process."""
    graph = torch.cuda.CUDAGraph
    begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        global recording
        begin(self, *args, **kwargs)
        recording = []

    def capture_end(self: Any) -> None:
        global recording
        self.computations, recording = recording, None
        end(self)

    def replayed(self: Any) -> None:
        replay(self)
        for compute in self.computations:
            compute()

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed  # type: ignore[method-assign]
    Computed().__enter__()
