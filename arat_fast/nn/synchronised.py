"""Batch normalisation over the images of all ranks: split BN with all-reduced statistics, and a 1-d one.

Built from the split BN's four ops with a collective between the halves; unlike `nn.SyncBatchNorm` it knows
branches and runs on CPU tensors. Every rank brings equally many images. The gradient that reaches `x` is that
of the sum of all ranks' losses, so that averaging parameter gradients over ranks, as DistributedDataParallel
does, gives the gradient of one process with the whole batch; attacks, whose losses are sums, need no such
care.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.split_batch_norm import (
    batch_norm_apply,
    batch_norm_input_gradient,
    batch_norm_reduce,
    batch_norm_statistics,
)
from .branch_state import BranchState

__all__ = ["SynchronisedBatchNorm1d", "synchronise_batch_norm", "synchronised_batch_norm"]


def _statistics(x: Tensor, branches: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks, (branches, C); Chan's combination of equal counts."""
    mine = torch.stack(batch_norm_statistics(x, branches))
    world = dist.get_world_size(group)
    every = mine.new_empty((world, *mine.shape))
    dist.all_gather(list(every.unbind()), mine, group=group)
    means, variances = every[:, 0], every[:, 1]
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


class _SynchronisedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _statistics(x, weight.shape[0], group)
        y, bits = batch_norm_apply(x, mean, var, weight, bias, residual, relu, eps)
        # Where the ReLU let through: found again from x, unless a residual hides it.
        gate = None
        if relu and residual is not None:
            gate = bits if bits.numel() else y
        ctx.save_for_backward(x, weight, bias, mean, var, gate)
        ctx.relu, ctx.eps, ctx.group, ctx.residual = relu, eps, group, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, gate = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        sums = batch_norm_reduce(dy, x, gate, ctx.relu, mean, var, weight, bias, ctx.eps)
        over_all = torch.stack(sums)
        dist.all_reduce(over_all, group=ctx.group)
        rows = x.numel() // weight.numel() * dist.get_world_size(ctx.group)
        dx, dresidual = batch_norm_input_gradient(
            dy,
            x,
            gate,
            ctx.relu,
            mean,
            var,
            weight,
            bias,
            over_all[0],
            over_all[1],
            1 / rows,
            ctx.residual,
            ctx.eps,
        )
        return dx, sums[1], sums[0], dresidual if ctx.residual else None, None, None, None


def synchronised_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) as `split_batch_norm` gives for the batch of all ranks together.

    x: (N, C, H, W) channels-last, N the same on every rank; weight, bias: (branches, C). Not to be compiled.
    """
    y, mean, var = _SynchronisedBatchNorm.apply(x, weight, bias, residual, relu, eps, group)  # type: ignore[no-untyped-call]
    return y, mean, var


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total: Tensor = _SumOverRanks.apply(value, group)  # type: ignore[no-untyped-call]
    return total


class SynchronisedBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of (N, C) features in train mode, over the N images of every rank."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """Like `input`; running statistics are updated by the whole batch's."""
        if not self.training:
            return super().forward(input)
        world = dist.get_world_size(self.group)
        count = len(input) * world
        mean = _sum_over_ranks(input.sum(0), self.group) / count
        centred = input - mean
        square = _sum_over_ranks(centred.square().sum(0), self.group)
        var = square / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(square / (count - 1), self.momentum)
        return centred * torch.rsqrt(var + self.eps) * self.weight + self.bias


def synchronise_batch_norm(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Let every split BN and `nn.BatchNorm1d` of `module` normalise over all ranks; keys stay as they are."""
    for layer in module.modules():
        state = getattr(layer, "state", None)
        if isinstance(state, BranchState):
            state.group = group
        if type(layer) is nn.BatchNorm1d:
            layer.__class__ = SynchronisedBatchNorm1d
            layer.group = group  # type: ignore[assignment]
