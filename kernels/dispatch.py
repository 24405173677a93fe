"""Which implementation runs (Triton or the reference twin), and the argument checks of the public functions.

Triton runs on CUDA and ROCm tensors; on CPU tensors only in the interpreter, which Triton turns on when
TRITON_INTERPRET=1 is set before a kernel is decorated. Checks read metadata only, never a device value, so
they neither synchronise nor break a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels are launched for `tensor`: it lies on a CUDA/ROCm device, or the interpreter is on."""
    return tensor.is_cuda or INTERPRETING


def traceable(kernel: Callable[..., Any]) -> Any:
    """`wrap_triton(kernel)`, so that Inductor launches it itself; an interpreted kernel as it is."""
    return kernel if INTERPRETING else wrap_triton(kernel)


def block_size(on_gpu: int, numel: int) -> int:
    """`on_gpu`; in the interpreter a block that makes few programs (1 M elements: 0.1 s instead of 1.5 s)."""
    if not INTERPRETING:
        return on_gpu
    return int(max(on_gpu, min(1 << 16, triton.next_power_of_2(max(numel, 1)))))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches there."""
    # A fake tensor may be on a GPU that is not there.
    there = tensor.is_cuda and torch.cuda.is_initialized()
    return torch.cuda.device(tensor.device) if there else nullcontext()


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], ndim: int | None = None) -> None:
    """TypeError when `value` is no tensor of `dtypes`; ValueError when it is not `ndim`-dimensional."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of {_names(dtypes)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {_names([value.dtype])}; expected {_names(dtypes)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {ndim} dimensions")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError when `value` and `other` differ in shape or device."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected {tuple(other.shape)}, the shape of {other_name}"
        )
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError when the two tensors lie on different devices."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}; expected {other.device}, the device of {other_name}")


def check_channels_last(name: str, value: Tensor) -> None:
    """ValueError when `value` is not 4-d and dense in channels-last order; nothing here copies to it."""
    if value.ndim != 4 or not value.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and strides {value.stride()}; expected a 4-d "
            "channels-last tensor: convert it once with .to(memory_format=torch.channels_last)"
        )


def check_same_layout(**tensors: Tensor) -> None:
    """ValueError unless all are dense in one memory order: all channels-last (4-d) or all contiguous."""
    values = list(tensors.values())
    if all(value.is_contiguous() for value in values):
        return
    if all(v.ndim == 4 and v.is_contiguous(memory_format=torch.channels_last) for v in values):
        return
    strides = ", ".join(f"{name} {value.stride()}" for name, value in tensors.items())
    raise ValueError(
        f"strides are {strides}; expected all tensors channels-last or all contiguous: "
        "convert once with .to(memory_format=torch.channels_last)"
    )


def check_amount(name: str, value: float | Tensor, like: Tensor) -> None:
    """`value` is a finite number of at least 0, or a 0-d float tensor on the device of `like`.

    Raises TypeError or ValueError. A tensor's value is not read: that would synchronise host and device.
    """
    if isinstance(value, Tensor):
        dtypes = (torch.float32,) if like.dtype != torch.float64 else (torch.float32, torch.float64)
        check_tensor(name, value, dtypes, ndim=0)
        check_device(name, value, "the images", like)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number or a 0-d float32 tensor")
    elif not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}; expected a finite number of at least 0")


def counter_tensor(name: str, value: int | Tensor, like: Tensor) -> Tensor:
    """`value`, a seed, offset or epoch, as a 0-d int64 tensor on the device of `like`.

    A tensor passes through, so a captured CUDA graph reads the number that is there at each replay; an int
    costs a fill launch. Raises TypeError or ValueError for anything else.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, (torch.int64,), ndim=0)
        check_device(name, value, "the images", like)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an int or a 0-d int64 tensor")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}; expected a 64-bit signed integer")
    return torch.full((), value, dtype=torch.int64, device=like.device)
