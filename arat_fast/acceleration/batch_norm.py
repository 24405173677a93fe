"""Split BatchNorm in a place where nobody has arranged layouts and shapes for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d
from arat_fast.nn.branches import BATCH_NORM_ENTRIES, split_copy

__all__ = ["DropInBatchNorm2d", "DropInBatchNormAct2d", "drop_in", "has_hooks", "original_of", "why_not"]


class DropInBatchNorm2d(SplitBatchNorm2d):
    """`SplitBatchNorm2d` that takes what the BatchNorm in its place took: any memory format, any residual.

    What is channels-last already is not copied. A hook sees the normalised input, as before: with one,
    addition and ReLU follow on their own.
    """

    original: tuple[nn.BatchNorm2d]  # in a tuple, so that it is no submodule

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`forward`, and the hooks."""
        if (residual is not None or relu) and not has_hooks(self):
            return super().__call__(x, residual, relu)
        y: Tensor = super().__call__(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`[ReLU](BN(x) [+ residual])`, channels-last; the residual may broadcast or have another dtype."""
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            return super().forward(x, relu=relu)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            y = super().forward(x) + residual
            return F.relu(y) if relu else y
        return super().forward(x, residual.contiguous(memory_format=torch.channels_last), relu)


class DropInBatchNormAct2d(DropInBatchNorm2d):
    """In the place of timm's BatchNormAct2d: BatchNorm, dropout and activation in one module."""

    drop: nn.Module
    act: nn.Module
    fused: bool

    @property
    def afterwards(self) -> tuple[nn.Module, nn.Module]:
        """What follows the normalisation, also where that is folded into a convolution."""
        return self.drop, self.act

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """act(drop(BN(x))), one fused call where that is a ReLU."""
        if self.fused:
            return super().forward(x, relu=True)
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


def _is_norm_act(module: nn.Module) -> bool:
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def why_not(module: nn.BatchNorm2d) -> str | None:
    """The reason why `module` cannot be replaced, None where it can."""
    if type(module) is not nn.BatchNorm2d and not _is_norm_act(module):
        return f"left as it is: a {type(module).__name__}, not nn.BatchNorm2d itself"
    if not module.affine or module.running_mean is None:
        return "left as it is: without affine parameters or running statistics"
    if module.weight.dtype not in (torch.float32, torch.float64):
        kind = str(module.weight.dtype).removeprefix("torch.")
        return f"left as it is: its parameters are {kind}; keep them float32 and ask for precision"
    return None


def drop_in(module: nn.BatchNorm2d, branches: tuple[str, ...], fuse: bool) -> DropInBatchNorm2d:
    """The replacement of a BatchNorm that `why_not` has nothing against; hooks go with it."""
    kind = DropInBatchNormAct2d if _is_norm_act(module) else DropInBatchNorm2d
    new = split_copy(module, kind, branches)
    if isinstance(new, DropInBatchNormAct2d):
        assert isinstance(module.drop, nn.Module)
        assert isinstance(module.act, nn.Module)
        new.drop, new.act = module.drop, module.act
        new.fused = fuse and type(new.drop) is nn.Identity and type(new.act) is nn.ReLU
    new.original = (module,)
    _share_hooks(module, new)
    return new


@torch.no_grad()
def original_of(module: DropInBatchNorm2d, branch: str) -> nn.BatchNorm2d:
    """The BatchNorm that was replaced, with the present values of one branch."""
    (original,) = module.original
    original.to(module.weight.device, module.weight.dtype)
    k = module.branches.index(branch)
    for name in BATCH_NORM_ENTRIES:
        getattr(original, name).copy_(getattr(module, name)[k])
    original.weight.requires_grad_(module.weight.requires_grad)
    original.bias.requires_grad_(module.bias.requires_grad)
    return original.train(module.training)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """The same dictionaries, so that a handle from before removes its hook from the new module."""
    values: dict[str, Any] = old.__dict__
    for name, value in values.items():
        if "hook" in name:
            new.__dict__[name] = value
