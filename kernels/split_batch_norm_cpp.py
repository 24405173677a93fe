"""Split batch normalisation on a CPU in C++: split_batch_norm.cpp, fp32 and bf16, batch statistics.

One parallel region a pass, ReLU and residual within it, both branches at once: forward 1.5 to 2.8 times as
fast as PyTorch's channels-last kernels, backward 1.7 to 6 times (ResNet-18's layers; bench/NOTES.md).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .cpp_library import library
from .dispatch import INTERPRETING
from .split_batch_norm_reference import backward_reference

__all__ = ["EagerSplitBatchNorm", "batch_backward_cpp", "batch_forward_cpp", "on_cpp", "on_cpp_eagerly"]

DTYPES = (torch.float32, torch.bfloat16)

_SHAPE: list[Any] = [ctypes.c_int, *[ctypes.c_int64] * 3]
_REST: list[Any] = [ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_int]


@functools.cache
def _functions() -> ctypes.CDLL | None:
    functions = library("split_batch_norm")
    if functions is not None:
        functions.scratch_floats.argtypes = [ctypes.c_int64] * 3
        functions.scratch_floats.restype = ctypes.c_int64
        functions.split_bn_forward.argtypes = [*_SHAPE, *[ctypes.c_void_p] * 7, *_REST]
        functions.split_bn_backward.argtypes = [*_SHAPE, *[ctypes.c_void_p] * 12, *_REST]
        functions.split_bn_forward.restype = functions.split_bn_backward.restype = None
    return functions


def on_cpp(x: Tensor) -> bool:
    """Whether the C++ kernels run on this tensor."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not INTERPRETING and _functions() is not None


def on_cpp_eagerly(x: Tensor) -> bool:
    """Whether they do, and nobody traces: `EagerSplitBatchNorm` may stand in for the op."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter) and on_cpp(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    branches, channels = weight.shape
    return int(x.dtype == torch.bfloat16), branches, x.numel() // weight.numel(), channels


def _scratch(functions: ctypes.CDLL, shape: tuple[int, int, int, int]) -> Tensor:
    # Whatever the default dtype and device are.
    return torch.empty(functions.scratch_floats(*shape[1:]), dtype=torch.float32, device="cpu")


def batch_forward_cpp(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, biased variance) with the statistics of the batch."""
    functions = _functions()
    assert functions is not None
    shape = _shape(x, weight)
    scratch = _scratch(functions, shape)
    y, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    pointers = (_pointer(t) for t in (x, residual, y, weight, bias, mean, var))
    functions.split_bn_forward(*shape, *pointers, int(relu), eps, _pointer(scratch), torch.get_num_threads())
    return y, mean, var


def batch_backward_cpp(
    dy: Tensor,
    second: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, g, dweight, dbias) with batch statistics of dy, or of dy + `second`; g only where it is asked for.

    y is the ReLU's output; None: where it let through is found again from x, right only without a residual.
    """
    functions = _functions()
    assert functions is not None
    shape = _shape(x, weight)
    scratch = _scratch(functions, shape)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    g = torch.empty_like(x) if residual_gradient else None
    tensors = (dy, second, x, y, dx, g, weight, bias, mean, var, dweight, dbias)
    pointers = (_pointer(t) for t in tensors)
    functions.split_bn_backward(*shape, *pointers, int(relu), eps, _pointer(scratch), torch.get_num_threads())
    return dx, g, dweight, dbias


class EagerSplitBatchNorm(torch.autograd.Function):
    """`(y, mean, var) = apply(x, weight, bias, residual, relu, eps)`: op `split_bn_batch`, called directly.

    An op's way through PyTorch's dispatcher and its Python takes longer than a small layer. The arguments
    are those that `check_batch` accepts.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        return batch_forward_cpp(x, weight, bias, residual, relu, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what backward reads. (Apart from `forward`, so that torch.func.grad works too.)"""
        x, weight, bias, residual, ctx.relu, ctx.eps = inputs
        y, mean, var = output
        ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, mean, var, weight, bias)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _mean: None, _var: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, weight, bias and residual; differentiable again."""
        if dy is None:
            return (None,) * 6
        x, y, mean, var, weight, bias = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        need_residual = ctx.needs_input_grad[3]
        through = need_residual and ctx.relu
        g: Tensor | None
        if torch.is_grad_enabled():  # create_graph=True
            dx, g, dweight, dbias = backward_reference(dy, x, y, ctx.relu, weight, bias, ctx.eps)
        else:
            dx, g, dweight, dbias = batch_backward_cpp(
                dy, None, x, y, ctx.relu, mean, var, weight, bias, through, ctx.eps
            )
        return dx, dweight, dbias, (g if through else dy) if need_residual else None, None, None
