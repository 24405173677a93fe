"""Split batch norm, fused: `y = [ReLU](BN_branch(x) [+ residual])`, for a batch that is [clean; adv].

    μ_b, v_b = mean and biased variance over the rows of branch b        (or the running statistics)
    y = [max(0, ·)]((x − μ_b)·weight_b / √(v_b + eps) + bias_b [+ residual])

x is (N, C, H, W) channels-last, fp32, bf16 or fp16; weight, bias and statistics are (B, C) fp32. The batch is
B equal parts in order, part b through branch b; B = 1 is plain batch normalisation. (float64 throughout, off
the kernels.)

Bytes moved, with e bytes an element: forward 3·e (x twice, y once), +e for a residual, +1/8 for the ReLU's
bits where a residual hides its sign; backward 5·e (dy and x twice, dx once), +e for the residual's gradient,
+2/8 for the bits. With running statistics 2·e forward and 2·e + 1/8 backward: the statistics are constants
and x is not read. A layer small enough for one launch is read once: 2·e forward, 3·e backward.

Where the ReLU let through is one bit an element, or nothing at all: with batch statistics and no residual,
backward reads x anyway and finds the sign again from it. On the CPU y stands in for the bits, which the next
layer keeps alive. The CPU's kernels are C++ (`split_batch_norm_cpp`), PyTorch's where no compiler is.

Four ops compose (statistics, apply; reduce, input gradient), so that synchronised BN can all-reduce between
them; `split_bn_batch` and its backward fuse them into fewer launches. All are functional: running statistics
are the caller's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import split_batch_norm_batch_ops, split_batch_norm_joined  # noqa: F401  register the ops
from .compile_cases import CompileCase
from .split_batch_norm_checks import check_batch
from .split_batch_norm_cpp import EagerSplitBatchNorm, on_cpp_eagerly
from .split_batch_norm_reference import split_batch_norm_reference

__all__ = [
    "batch_norm_apply",
    "batch_norm_input_gradient",
    "batch_norm_reduce",
    "batch_norm_statistics",
    "compile_cases",
    "split_batch_norm",
    "split_batch_norm_reference",
]


def batch_norm_statistics(x: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each branch's part of the batch, (branches, C) fp32; no gradients.

    Raises TypeError or ValueError for another dtype, layout, or a batch that is no multiple of `branches`.
    """
    mean, var = torch.ops.arat_fast.split_bn_statistics(x, branches)
    return mean, var


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Y with the given statistics, and the ReLU's bits: uint8 (N·H·W, ceil(C/8)), off Triton empty.

    Statistics count as constants: no gradient reaches `mean` and `var`. Differentiable twice in the rest.
    """
    y, bits = torch.ops.arat_fast.split_bn_apply(x, mean, var, weight, bias, residual, relu, eps)
    return y, bits


def batch_norm_reduce(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(Σ g, Σ g·x̂), (branches, C) each, the gradients of bias and weight; g = dy where ReLU let through.

    `gate` tells where: the bits of `batch_norm_apply`, or y itself (off the kernels), or None: found again
    from x, which is right only without a residual.
    """
    sum_g, sum_gxhat = torch.ops.arat_fast.split_bn_reduce(dy, x, gate, relu, mean, var, weight, bias, eps)
    return sum_g, sum_gxhat


def batch_norm_input_gradient(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor | None,
    sum_gxhat: Tensor | None,
    per_count: float,
    residual_gradient: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(dx, gradient of the residual or an empty tensor), like dy.

    With the sums of `batch_norm_reduce` (over all ranks, `per_count` = 1 / rows over all ranks) the
    statistics are those of the batch; without them they are constants, x is not needed, and the op can be
    differentiated again.
    """
    dx, dresidual = torch.ops.arat_fast.split_bn_input_gradient(
        dy, x, gate, relu, mean, var, weight, bias, sum_g, sum_gxhat, per_count, residual_gradient, eps
    )
    return dx, dresidual


def split_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[ReLU](BN_branch(x) [+ residual])` of a batch that is `weight.shape[0]` equal parts, one a branch.

    Args:
        x: (N, C, H, W), channels-last; float32, bfloat16 or float16 (float64: slow path). N a multiple of B.
        weight: (B, C) float32, contiguous (float64 for float64 x).
        bias: like weight.
        running_mean: like weight; with `running_var`: normalise by these. Without: by the batch's own
            statistics.
        running_var: like weight.
        residual: like x, added before the ReLU.
        relu: clamp at zero.
        eps: added to the variance.

    Returns:
        y like x, and the mean and biased variance used, each (B, C), which carry no gradient.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong layout, shape or device, a batch that does not divide, or a single value a channel
            with batch statistics.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither")
    if running_mean is None or running_var is None:
        if on_cpp_eagerly(x):
            check_batch(x, weight, bias, residual)
            y, mean, var = EagerSplitBatchNorm.apply(x, weight, bias, residual, relu, eps)  # type: ignore[no-untyped-call]
            return y, mean, var
        y, _, mean, var = torch.ops.arat_fast.split_bn_batch(x, weight, bias, residual, relu, eps)
        return y, mean, var
    y, _ = torch.ops.arat_fast.split_bn_apply(x, running_mean, running_var, weight, bias, residual, relu, eps)
    return y, running_mean, running_var


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel here in every specialisation that the trainer launches."""
    from .split_batch_norm_cases import cases

    return cases()
