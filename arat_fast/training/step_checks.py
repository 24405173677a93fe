"""What a `TrainStep` refuses before anything has changed."""

from __future__ import annotations

import torch
from torch import nn

from arat_fast.methods.base import Method
from arat_fast.nn import SplitBatchNorm2d, bind_branches
from arat_fast.nn.branch_state import BranchState, shared_state
from arat_fast.nn.branches import refuse_other_batch_norms


def check_optimizer(model: nn.Module, method: Method, optimizer: torch.optim.Optimizer) -> None:
    """ValueError for a parameter to be trained that it does not hold.

    One made before a conversion would train parameters that the model no longer has.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name
        for prefix, module in (("model.", model), ("method.", method))
        for name, p in ((prefix + n, p) for n, p in module.named_parameters())
        if p.requires_grad and id(p) not in held
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"the optimizer does not hold {shown}: build it last, over [*model.parameters(), "
            "*method.parameters()]; a parameter that shall stay gets requires_grad_(False)"
        )


def check_branches(model: nn.Module, method: Method) -> None:
    """ValueError where the method needs branches that the model lacks, or a BatchNorm obeys none."""
    for path, layer in model.named_modules():
        refuse_other_batch_norms(path, layer)
    if not any(isinstance(layer, nn.BatchNorm2d | SplitBatchNorm2d) for layer in model.modules()):
        if len(method.branches) > 1:
            raise ValueError(
                f"{type(method).__name__} uses the BatchNorm branches {method.branches}; "
                f"{type(model).__name__} has no BatchNorm2d to split. Choose a method with one branch "
                "(ARAT: split_bn=False)"
            )
        # Nothing to choose from: a state of its own lets the same calls work.
        model._branch_state = BranchState(method.branches)  # type: ignore[assignment]
    have = (shared_state(model) or bind_branches(model)).branches
    missing = [b for b in method.branches if b not in have]
    if missing or len(method.branches) != len(have):
        raise ValueError(
            f"{type(method).__name__} uses the BatchNorm branches {method.branches}; the model has {have}. "
            "Build it with these branches, or convert it: convert_split_bn(model, branches)"
        )
    known = {name for name, _ in model.named_modules()}
    absent = [name for name in method.taps if name not in known]
    if absent:
        raise ValueError(f"{type(method).__name__} taps {absent}; the model has no such layers")
