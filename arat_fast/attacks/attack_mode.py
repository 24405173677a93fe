"""A model as an attack sees it: BatchNorm mode and branch chosen, and afterwards everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arat_fast.nn import SplitBatchNorm2d, bn_mode, use_branch

__all__ = ["attack_mode", "has_split_bn", "weights_without_gradients"]

# Exactly these: a subclass may compute with its weights, and should do so in fp32.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def has_split_bn(model: nn.Module) -> bool:
    """Whether any layer is a `SplitBatchNorm2d`."""
    return any(isinstance(module, SplitBatchNorm2d) for module in model.modules())


@contextmanager
def attack_mode(
    model: nn.Module, *, batch_statistics: bool, update_statistics: bool, branch: str | None
) -> Iterator[None]:
    """Eval mode for all but BatchNorm, which uses the batch's or the running statistics; then as before.

    Only `training` flags are set: `train()` and `eval()` of the model's own classes are not called.
    """
    before = [(module, module.training) for module in model.modules()]
    with ExitStack() as choices:
        if branch is not None:
            choices.enter_context(use_branch(model, branch))
        if has_split_bn(model):
            statistics = "batch" if batch_statistics else "running"
            choices.enter_context(bn_mode(model, statistics, update_statistics))  # type: ignore[arg-type]
        try:
            for module, training in before:
                wanted = batch_statistics and isinstance(module, _BatchNorm | SplitBatchNorm2d)
                if training != wanted:
                    module.training = wanted
            yield
        finally:
            for module, training in before:
                if module.training != training:
                    module.training = training


def weights_without_gradients(
    model: nn.Module, half: torch.dtype | None = None, copy_buffers: bool = False
) -> dict[str, Tensor]:
    """The model's parameters by name, detached, for `torch.func.functional_call` with tie_weights=False.

    No weight gradient can be computed from them, and convolutions keep no input for one. half: cast the
    fp32 weights of convolutions and linear layers to it. copy_buffers: also the buffers, as copies, so that
    what a forward does to statistics is lost.
    """
    tensors: dict[str, Tensor] = {}
    made: dict[tuple[int, torch.dtype], Tensor] = {}  # tied ones stay one
    # Each module under one name: given two, functional_call would leave its own tensors in the module.
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            dtype = parameter.dtype
            if half is not None and type(module) in _CAST and dtype is torch.float32:
                dtype = half
            tensors[prefix + name] = made.setdefault((id(parameter), dtype), parameter.detach().to(dtype))
        if copy_buffers:
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                copy = made.setdefault((id(buffer), buffer.dtype), buffer.detach().clone())
                tensors[prefix + name] = copy
    return tensors
