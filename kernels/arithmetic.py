"""Device functions that several kernels call, and how a number or a 0-d tensor reaches them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def clamp_keeping_nan(value, low, high):
    """min(max(value, low), high) in which a NaN of any of the three comes through, as in PyTorch."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amount(tensor, value, FROM_TENSOR: tl.constexpr):
    """A number of either kind as an fp32 scalar: Inductor passes Python's as fp64, half as fast."""
    if FROM_TENSOR:
        result = tl.load(tensor).to(tl.float32)
    else:
        result = tl.full((), value, tl.float32)  # not tl.to_tensor: Triton 3.6 has none
    return result


def amount_arguments(value: float | Tensor, stand_in: Tensor) -> tuple[Tensor, float, bool]:
    """(tensor, value, FROM_TENSOR) of `amount`; without a tensor, `stand_in` is passed, not read."""
    if isinstance(value, Tensor):
        return value, 0.0, True
    return stand_in, float(value), False
