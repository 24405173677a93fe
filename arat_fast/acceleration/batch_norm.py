"""What stands in a BatchNorm's place: the fused one, or split BN where there are several branches."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d
from arat_fast.nn.branch_state import BranchState
from arat_fast.nn.branches import BATCH_NORM_ENTRIES, split_copy
from arat_fast.nn.fused_batch_norm import FusedBatchNorm2d, has_hooks

from .classes import subclass

__all__ = [
    "DropInBatchNorm2d",
    "DropInBatchNormAct2d",
    "FusedBatchNormAct2d",
    "drop_in",
    "fuse_in_place",
    "original_of",
    "unfuse",
    "why_not",
]


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


class _ThenAct(nn.Module):
    """BatchNorm, dropout and activation in one module, before the BatchNorm among its bases."""

    drop: nn.Module
    act: nn.Module

    @property
    def afterwards(self) -> tuple[nn.Module, nn.Module]:
        """What follows the normalisation, also where that is folded into a convolution."""
        return self.drop, self.act

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """act(drop(BN(x))), one fused call where that is a ReLU."""
        if self.fused:
            return super().forward(x, relu=True)  # type: ignore[no-any-return,misc]
        y: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[misc]
        return y


class DropInBatchNormAct2d(_ThenAct, DropInBatchNorm2d):
    """In the place of timm's BatchNormAct2d."""

    fused: bool


class FusedBatchNormAct2d(_ThenAct, FusedBatchNorm2d):
    """What timm's BatchNormAct2d becomes, as a subclass of it."""

    @property
    def fused(self) -> bool:
        """Whether it is BatchNorm and ReLU, which is one call."""
        return _is_relu_alone(self.drop, self.act)


def _is_norm_act(module: nn.Module) -> bool:
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def _is_relu_alone(drop: nn.Module, act: nn.Module) -> bool:
    return type(drop) is nn.Identity and type(act) is nn.ReLU


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


def fuse_in_place(module: nn.BatchNorm2d, state: BranchState, channels_last: bool) -> None:
    """Make a BatchNorm that `why_not` has nothing against a `FusedBatchNorm2d`; `unfuse` undoes it."""
    module.state = state  # type: ignore[assignment]
    module.channels_last = channels_last  # type: ignore[assignment]
    _fuse_again(module)


def _fuse_again(module: nn.Module) -> None:
    cls: Any = type(module)
    module.__class__ = _fused_act(cls) if _is_norm_act(module) else FusedBatchNorm2d


@functools.cache  # one class for all layers, for compilers' sake
def _fused_act(cls: Any) -> type[nn.Module]:
    return subclass(cls, _fuse_again, {}, FusedBatchNormAct2d)


def unfuse(module: FusedBatchNorm2d) -> None:
    """The BatchNorm that it was."""
    module.__class__ = vars(type(module)).get("_plain_class", nn.BatchNorm2d)
    del module.state, module.channels_last


def drop_in(module: nn.BatchNorm2d, branches: tuple[str, ...], fuse: bool) -> DropInBatchNorm2d:
    """Split BN in the place of a BatchNorm that `why_not` has nothing against; hooks go with it."""
    kind = DropInBatchNormAct2d if _is_norm_act(module) else DropInBatchNorm2d
    new = split_copy(module, kind, branches)
    if isinstance(new, DropInBatchNormAct2d):
        assert isinstance(module.drop, nn.Module)
        assert isinstance(module.act, nn.Module)
        new.drop, new.act = module.drop, module.act
        new.fused = fuse and _is_relu_alone(new.drop, new.act)
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


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """The same dictionaries, so that a handle from before removes its hook from the new module."""
    values: dict[str, Any] = old.__dict__
    for name, value in values.items():
        if "hook" in name:
            new.__dict__[name] = value
