"""Running-statistics BN folded into the convolution before it: W' = W·s, b' = (b − μ)·s + bias.

With s = weight/√(v + eps). Exact up to rounding (fp32 ResNet-18: logits 2e-7, gradients 4e-7 relative), and
one pass over each activation less. For attacks with running statistics, whose forwards and backwards then
contain no BN where a convolution precedes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .branch_state import BOTH
from .branches import bind_branches, bn_mode, use_branch
from .foldable import foldable
from .following import follow_settings
from .fused_batch_norm import FusedBatchNorm2d
from .split_batch_norm import SplitBatchNorm2d

__all__ = ["FoldedBatchNorm", "FoldedModel"]


class FoldedBatchNorm(nn.Module):
    """Stands where a folded BN was: adds, clamps at zero, and does what the BN did afterwards."""

    def __init__(self, afterwards: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.afterwards = nn.Sequential(*afterwards)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """`[ReLU](x [+ residual])`."""
        y = x if residual is None else x + residual
        y = y.relu() if relu else y
        return self.afterwards(y) if len(self.afterwards) else y


class _Fold(NamedTuple):
    conv: nn.Conv2d
    bn: SplitBatchNorm2d | nn.BatchNorm2d
    eps: float
    weight: Tensor
    bias: Tensor


class FoldedModel:
    """A twin of `model` for one branch and running statistics, BN folded where a convolution precedes it.

    `module` is the twin: in eval mode, no parameter requires grad. What is not folded shares memory with
    `model`; the folded weights are brought up to date by `refresh()`, once an iteration, by device work
    alone.

    Args:
        model: with `SplitBatchNorm2d` or `nn.BatchNorm2d`.
        branch: of the split BNs; None where there are none.
        example: images (N, …) to run once, to see which BN gets which convolution's output; channels-last for
            split BN.

    Raises:
        ValueError: the twin's output differs (a convolution's output is used elsewhere too).
    """

    def __init__(self, model: nn.Module, branch: str | None, example: Tensor) -> None:
        if branch == BOTH:
            raise ValueError(f"branch is {BOTH!r}; expected one branch: a convolution has one set of weights")
        tensors = [*model.parameters(), *model.buffers()]
        shared: dict[int, object] = {id(t): _frozen(t) for t in tensors}
        self.module = copy.deepcopy(model, shared).eval()
        self._branch = 0
        if any(isinstance(m, SplitBatchNorm2d) for m in self.module.modules()):
            if branch is None:
                raise ValueError("branch is None; expected one of the model's branches")
            use_branch(self.module, branch)
            self._branch = bind_branches(self.module).index or 0
            bn_mode(self.module, "running", update=False)
        elif branch is not None:
            raise ValueError(f"branch is {branch!r}; expected None: the model has no split BN")
        for layer in self.module.modules():
            if isinstance(layer, FusedBatchNorm2d):
                layer.state.set_mode("running", False)
        with torch.no_grad():
            before = self.module(example)
            pairs = foldable(self.module, example)
        self._folds = [self._fold(model, conv, bn) for conv, bn in pairs]
        originals = dict(model.named_modules())
        self._copies = [
            (layer, originals[name])
            for name, layer in self.module.named_modules()
            if name in originals and not isinstance(layer, FoldedBatchNorm)
        ]
        self.refresh()
        with torch.no_grad():
            after = self.module(example)
        error = (after - before).abs().max() / before.abs().max().clamp_min(1e-30)
        if not float(error) < 1e-2:  # bf16 under autocast rounds at 4e-3
            raise ValueError(
                f"folding changes the output by {float(error):.1e}; a convolution feeds more than its BN"
            )

    @property
    def folded(self) -> int:
        """How many BNs are folded."""
        return len(self._folds)

    def _fold(self, model: nn.Module, conv_name: str, bn_name: str) -> _Fold:
        conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
        folded = self.module.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(folded, nn.Conv2d)
        assert isinstance(bn, SplitBatchNorm2d | nn.BatchNorm2d)
        folded.weight = nn.Parameter(torch.empty_like(conv.weight), requires_grad=False)
        folded.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels), requires_grad=False)
        parent, _, last = bn_name.rpartition(".")
        afterwards = getattr(self.module.get_submodule(bn_name), "afterwards", ())
        setattr(self.module.get_submodule(parent), last, FoldedBatchNorm(afterwards))
        return _Fold(conv, bn, bn.eps, folded.weight, folded.bias)

    def _rows(self, entry: str) -> list[Tensor]:
        """An entry of every folded BN, (C,) each: the branch's row where it is stacked."""
        tensors: list[Tensor] = [getattr(fold.bn, entry) for fold in self._folds]
        return [tensor[self._branch] if tensor.ndim == 2 else tensor for tensor in tensors]

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold again from the model's weights and statistics of now. No synchronisation; can be captured."""
        follow_settings(self._copies)
        if not self._folds:
            return
        scales = list(torch._foreach_add(self._rows("running_var"), [fold.eps for fold in self._folds]))
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, self._rows("weight"))
        shifts = list(torch._foreach_neg(self._rows("running_mean")))
        for shift, fold in zip(shifts, self._folds, strict=True):
            if fold.conv.bias is not None:
                shift.add_(fold.conv.bias)
        torch._foreach_mul_(shifts, scales)
        torch._foreach_add_(shifts, self._rows("bias"))
        weights: list[Tensor] = [fold.weight for fold in self._folds]
        torch._foreach_copy_(weights, [fold.conv.weight for fold in self._folds])
        torch._foreach_mul_(weights, [scale.view(-1, 1, 1, 1) for scale in scales])
        torch._foreach_copy_([fold.bias for fold in self._folds], shifts)


def _frozen(tensor: Tensor) -> Tensor:
    """The same memory, as something that no gradient reaches."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor
