"""`SplitBatchNorm2d`: one batch normalisation a branch, each with its affine and statistics, in one module.

Parameters and buffers are stacked, the branch first, because one launch then serves both branches:

    weight, bias, running_mean, running_var     (branches, C)
    num_batches_tracked                         (branches,)

These are the state_dict keys. A plain BatchNorm2d's entries, shape (C,), load too: every branch gets a copy.
Converters to and from other layouts are in `checkpoints`. An optimizer that picks weight decay by `ndim` sees
2 here, not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import use_triton
from ..kernels.split_batch_norm import split_batch_norm
from ..kernels.split_batch_norm_cpp import on_cpp
from .branch_state import BranchState
from .synchronised import synchronised_batch_norm

__all__ = ["SplitBatchNorm2d", "batch_normalised"]

_STACKED = ("weight", "bias", "running_mean", "running_var")


class SplitBatchNorm2d(nn.Module):
    """Batch normalisation of channels-last (N, C, H, W) with separate parameters and statistics a branch.

    Equal to one `nn.BatchNorm2d` a branch: momentum (None: cumulative average), eps, unbiased running
    variance. Which branch, and batch or running statistics, is in `state`, which the split BNs of a model
    share: choose with `use_branch` and `bn_mode`. At first: the last branch, and statistics by
    `self.training` as `nn.BatchNorm2d`.

    Args:
        num_features: C.
        branches: their names, in the order in which parameters and the parts of a "both" batch are stacked.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics.
        device: of the parameters.
        dtype: of the parameters; float32, or float64 for float64 activations.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        branches: Sequence[str] = ("clean", "adv"),
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; expected at least 1")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.state = BranchState(branches)
        shape = (len(self.branches), num_features)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros(shape[0], device=device, dtype=torch.long))

    @property
    def branches(self) -> tuple[str, ...]:
        """Names, in the order of the first dimension."""
        return self.state.branches

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`[ReLU](BN(x) [+ residual])`, like x; fused, each activation read as often as it must be.

        Raises ValueError or TypeError when x is not channels-last, not float, or, for "both", of an odd
        batch.
        """
        state = self.state
        index = None if len(state.branches) == 1 else state.index
        weight, bias, mean, var = (
            tensor if index is None else tensor.narrow(0, index, 1)
            for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        automatic = state.statistics == "auto"
        if not (self.training if automatic else state.statistics == "batch"):
            return split_batch_norm(
                x,
                weight,
                bias,
                running_mean=mean,
                running_var=var,
                residual=residual,
                relu=relu,
                eps=self.eps,
            )[0]
        update = automatic or state.update
        if state.parts == 1 and self._suits_pytorch(x, weight, residual):
            return self._by_pytorch(x, index or 0, update, residual, relu)
        y, mean, var, rows = batch_normalised(state, x, weight, bias, residual, relu, self.eps)
        if update:
            state.record(self, index, mean, var, rows)
        return y

    def _suits_pytorch(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
        """Whether PyTorch's own batch norm is the faster one: a CPU, eager mode, one branch.

        Off the kernels the op calls the same code, and its Python a layer made ResNet-8 on 8×8 images take
        1.8 times as long.
        """
        return (
            weight.shape[0] == 1
            and not use_triton(x)
            and self.state.group is None
            and self.momentum is not None
            and not torch.compiler.is_compiling()
            and not on_cpp(x)
            and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.shape[1] == self.num_features < x.numel()
            and (residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype))
        )

    def _by_pytorch(self, x: Tensor, k: int, update: bool, residual: Tensor | None, relu: bool) -> Tensor:
        mean, var = (self.running_mean[k], self.running_var[k]) if update else (None, None)
        y = F.batch_norm(x, mean, var, self.weight[k], self.bias[k], True, self.momentum or 0.0, self.eps)
        if update:
            self.num_batches_tracked[k] += 1
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    def extra_repr(self) -> str:
        """Arguments, as `nn.BatchNorm2d` shows them."""
        return f"{self.num_features}, branches={self.branches}, eps={self.eps}, momentum={self.momentum}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        branches = len(self.branches)
        for name in (*_STACKED, "num_batches_tracked"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.ndim == (0 if name == "num_batches_tracked" else 1):
                # A plain BatchNorm2d's entry. The caller's dictionary is PyTorch's own shallow copy here.
                state_dict[prefix + name] = value.expand(branches, *value.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def batch_normalised(
    state: BranchState,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(y, mean, var, rows of each part) by batch statistics, of the parts and processes that `state` says."""
    if state.parts > 1:
        weight, bias = (t.expand(state.parts, -1).contiguous() for t in (weight, bias))
    rows = x.numel() // weight.numel()
    if state.group is None:
        y, mean, var = split_batch_norm(x, weight, bias, residual=residual, relu=relu, eps=eps)
        return y, mean, var, rows
    rows *= state.group.size()
    y, mean, var = synchronised_batch_norm(
        x, weight, bias, state.group, residual=residual, relu=relu, eps=eps
    )
    return y, mean, var, rows
