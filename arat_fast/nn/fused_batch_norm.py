"""`FusedBatchNorm2d`: an `nn.BatchNorm2d` that also adds and clamps, by the kernels of split BN.

A BatchNorm2d becomes one by its class alone: the same module, parameters, buffers and hooks, so that whatever
knows BatchNorm by its class, its 1-d parameters or its attributes goes on as before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import use_triton
from ..kernels.split_batch_norm import split_batch_norm
from ..kernels.split_batch_norm_cpp import on_cpp
from .branch_state import BranchState, update_running_statistics
from .split_batch_norm import batch_normalised

__all__ = ["FusedBatchNorm2d", "has_hooks"]


class FusedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with `[ReLU](BN(x) [+ residual])` as one call; made of one by `accelerate`.

    Fused are channels-last activations with affine float32 parameters (float64 ones: off the kernels) and
    running statistics; all else runs by PyTorch. A hook sees the normalised input: with one, addition and
    ReLU follow on their own.

    Attributes:
        state: of one branch, shared with the model's other layers: `bn_mode` works on it, and running
            statistics are updated together when the model's forward ends.
        channels_last: turn other layouts to channels-last; False: their layout stays, by PyTorch.
    """

    state: BranchState
    channels_last: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`forward`, and the hooks."""
        if (residual is not None or relu) and not has_hooks(self):
            return cast(Tensor, super().__call__(x, residual, relu))
        return _finished(super().__call__(x), residual, relu)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`[ReLU](BN(x) [+ residual])`; the residual may broadcast or have another dtype."""
        self._check_input_dim(x)
        together = self.state.parts > 1 or self.state.group is not None  # known to the ops alone
        if self.channels_last or together:
            x = x.contiguous(memory_format=torch.channels_last)
        if not together and not self._suits_the_op(x):
            y = self._by_pytorch(x)
            if residual is not None:
                alike = (residual.shape, residual.dtype) == (y.shape, y.dtype)
                y = y.add_(residual) if alike else y + residual
            return y.relu_() if relu else y
        if residual is None:
            return self._by_the_op(x, None, relu)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            return _finished(self._by_the_op(x, None, False), residual, relu)
        return self._by_the_op(x, residual.contiguous(memory_format=torch.channels_last), relu)

    def _statistics(self) -> tuple[bool, bool]:
        """Whether the batch's statistics are taken, and whether they flow into the running ones."""
        automatic = self.state.statistics == "auto"
        batch = self.training if automatic else self.state.statistics == "batch"
        update = batch and self.track_running_stats and (automatic or self.state.update)
        return batch, update

    def _suits_the_op(self, x: Tensor) -> bool:
        if self.weight is None or self.bias is None or self.running_mean is None or self.running_var is None:
            return False
        if self.num_batches_tracked is None or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        # On a CPU PyTorch takes half to all of the op's time, but for C++, which has batch statistics alone.
        kernels = use_triton(x) or torch.compiler.is_compiling() or (on_cpp(x) and self._statistics()[0])
        if not kernels or x.shape[1] != len(self.weight):
            return False
        wide = x.dtype is torch.float64
        return x.is_floating_point() and all(
            t.dtype is (torch.float64 if wide else torch.float32)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )

    def _by_the_op(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        weight, bias = self.weight.unsqueeze(0), self.bias.unsqueeze(0)
        batch, update = self._statistics()
        if not batch:
            mean, var = (cast(Tensor, t).unsqueeze(0) for t in (self.running_mean, self.running_var))
            running: dict[str, Any] = {"running_mean": mean, "running_var": var}
            return split_batch_norm(x, weight, bias, **running, residual=residual, relu=relu, eps=self.eps)[0]
        y, mean, var, rows = batch_normalised(self.state, x, weight, bias, residual, relu, self.eps)
        if update:
            # DataParallel's replicas share the state over threads: none waits there for the others.
            record = update_running_statistics if "_is_replica" in vars(self) else self.state.record
            record(self, None, mean, var, rows)  # type: ignore[arg-type]
        return y

    def _by_pytorch(self, x: Tensor) -> Tensor:
        """What `nn.BatchNorm2d` does, by the mode that `state` says."""
        batch, update = self._statistics()
        momentum = self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        batch = batch or self.running_mean is None
        mean, var = (self.running_mean, self.running_var) if update or not batch else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, batch, momentum or 0.0, self.eps)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """`[ReLU](y [+ residual])`."""
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y
