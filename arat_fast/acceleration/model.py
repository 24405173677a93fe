"""`accelerate` a model in place, `revert` it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeGuard, TypeVar, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arat_fast.errors import unknown_name
from arat_fast.nn import SplitBatchNorm2d, bind_branches
from arat_fast.nn.bf16 import bf16_pays
from arat_fast.nn.branch_state import BranchState, shared_state
from arat_fast.nn.branches import replace_modules
from arat_fast.nn.fused_batch_norm import FusedBatchNorm2d

from .batch_norm import (
    DropInBatchNorm2d,
    DropInBatchNormAct2d,
    FusedBatchNormAct2d,
    drop_in,
    fuse_in_place,
    original_of,
    unfuse,
    why_not,
)
from .classes import restore
from .forwards import fuse_forwards, run_with
from .report import Report

__all__ = ["accelerate", "revert"]

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Precision = Literal["auto", "fp32", "bf16"]
SPLIT = ("clean", "adv")
SINGLE = ("adv",)  # the one branch that methods without split BatchNorm train


def accelerate(
    model: ModuleT,
    *,
    channels_last: bool = True,
    split_bn: bool | Sequence[str] = False,
    fused_bn: bool = True,
    precision: Precision = "auto",
    compile: bool = False,
) -> ModuleT:
    """Make `model` faster, in place, by named choices; `revert` undoes them all.

    Parameters, buffers, state_dict, names, methods and class of the model stay, and an optimizer built before
    goes on: a BatchNorm2d becomes a subclass of itself, `FusedBatchNorm2d`. With split_bn it becomes
    `SplitBatchNorm2d`, whose parameters are new ones: build the optimizer afterwards.

    Modules whose forward calls BN -> ReLU or BN -> add [-> ReLU] get a rewritten one, found by torch.fx; a
    forward that cannot be followed stays, its BatchNorms replaced but not fused. So does the old one run
    where an attribute that it reads has changed since, or a layer was replaced. Hooks go on seeing what they
    saw, and what they watch is computed on its own; only a ReLU that is hooked later may not be called any
    more. Copies and pickles of the model are accelerated models (when loaded, not compiled).

    Args:
        model: any network. Without BatchNorm2d (a transformer) layout, precision and compilation remain.
        channels_last: keep 4-d parameters, and with them activations, channels-last; `.view` cannot flatten
            those. False: layouts stay as they are, and only BatchNorms that get channels-last are fused.
        split_bn: a BatchNorm branch for clean and one for adversarial images, or for each of the given names;
            False: one branch.
        fused_bn: replace BatchNorm by the fused kernel, with ReLU and addition where they follow.
        precision: "bf16" runs the forward under autocast and returns float32; "auto" does so where bf16
            is fast; "fp32" leaves it to the caller. An autocast around the model does not change bf16.
        compile: compile the forward (`nn.Module.compile`).

    Returns:
        the model; `model.report` says what was done to what, and why not.

    Raises:
        TypeError: not an nn.Module.
        ValueError: accelerated already, an unknown precision, bf16 for float64 parameters, or split_bn of a
            model without BatchNorm2d or with one that cannot be split. Nothing is changed then.
    """
    names, skipped = _batch_norms(model, bool(split_bn))
    half = _half(model, precision)
    report = Report(
        skipped=skipped,
        channels_last=channels_last,
        precision="fp32" if half is None else "bf16",
        compiled=compile,
    )
    if names and (fused_bn or split_bn):
        report = _replace_batch_norms(model, names, split_bn, fused_bn, report)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if half is not None or channels_last:
        run_with(model, half, channels_last)
    if compile:
        model.compile(dynamic=False)
    if not hasattr(model, "report"):
        model.report = report  # type: ignore[assignment]
    model._acceleration = report  # type: ignore[assignment]
    log.info("%s: %s", type(model).__name__, report)
    return model


def revert(model: ModuleT, branch: str | None = None) -> ModuleT:
    """Undo `accelerate`, in place: `nn.BatchNorm2d` again, with the present values.

    branch: of split BN, whose values; None: the last one's, which is the inference branch (adv). After split
    BN build optimizers anew.

    Raises ValueError for a model that is not accelerated, or an unknown branch.
    """
    report = vars(model).get("_acceleration")
    if not isinstance(report, Report):
        raise ValueError(
            f"{type(model).__name__} is not accelerated; expected a model that accelerate returned"
        )
    chosen = report.branches[-1] if branch is None and report.branches else branch
    if chosen is not None and chosen not in report.branches:
        known = f"one of {report.branches}" if report.branches else "None: no BatchNorm was split"
        raise ValueError(f"branch is {chosen!r}; expected {known}")
    for module in model.modules():
        if isinstance(module, FusedBatchNorm2d):
            unfuse(module)
        module.__dict__.pop("_traced", None)
    restore(model)
    model._compiled_call_impl = None
    if chosen is not None:
        for layer in (m for m in model.modules() if isinstance(m, DropInBatchNorm2d)):
            layer.state.unbind(model)
        replace_modules(
            model, lambda _, m: original_of(m, chosen) if isinstance(m, DropInBatchNorm2d) else None
        )
    state = shared_state(model)
    if state is not None and not any(isinstance(m, SplitBatchNorm2d) for m in model.modules()):
        state.unbind(model)
        del model._branch_state
    if report.channels_last:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    del model._acceleration
    if vars(model).get("report") is report:
        del model.report
    return model


def _batch_norms(model: nn.Module, split: bool) -> tuple[list[str], dict[str, str]]:
    """Names of the BatchNorms that can be replaced, and why others cannot. Raises what `accelerate` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    name = type(model).__name__
    if "_acceleration" in vars(model) or any(
        isinstance(m, DropInBatchNorm2d | FusedBatchNorm2d) for m in model.modules()
    ):
        raise ValueError(f"{name} is accelerated already; revert it first")
    if isinstance(model, nn.BatchNorm2d):
        raise ValueError(f"model is itself a {name}; expected a network that holds it")
    names, skipped = [], {}
    for path, module in model.named_modules():
        if isinstance(module, SplitBatchNorm2d):
            skipped[path] = "left as it is: split already; accelerate the plain model with split_bn"
        elif isinstance(module, nn.BatchNorm2d) and (reason := why_not(module)) is not None:
            skipped[path] = reason
        elif isinstance(module, nn.BatchNorm2d):
            names.append(path)
        elif isinstance(module, _BatchNorm):
            skipped[path] = f"left as it is: a {type(module).__name__}"
    if split and skipped:
        path, reason = next(iter(skipped.items()))
        raise ValueError(f"split_bn: {path} cannot be split ({reason}); expected nn.BatchNorm2d throughout")
    if split and not names:
        raise ValueError(
            f"split_bn: {name} has no nn.BatchNorm2d to split; leave split_bn=False: layout, precision and "
            "compilation remain"
        )
    return names, skipped


def _half(model: nn.Module, precision: str) -> torch.dtype | None:
    """The dtype of autocast, None where there is to be none."""
    choices = get_args(Precision)
    if precision not in choices:
        raise ValueError(str(unknown_name("precision", precision, choices)))
    wide = any(p.dtype is torch.float64 for p in model.parameters())
    if precision == "bf16" and wide:
        raise ValueError("precision is 'bf16'; the model's parameters are float64: expected float32")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    automatic = precision == "auto" and not wide and bf16_pays(device)
    return torch.bfloat16 if precision == "bf16" or automatic else None


def _replace_batch_norms(
    model: nn.Module, names: list[str], split_bn: bool | Sequence[str], fuse: bool, report: Report
) -> Report:
    if split_bn:
        branches = SPLIT if isinstance(split_bn, bool) else tuple(split_bn)
        BranchState(branches)  # refuses names before the first change
        replace_modules(model, lambda _, m: drop_in(m, branches, fuse) if _replaceable(m) else None)
        bind_branches(model)
        report = replace(report, branches=branches)
    else:
        state = shared_state(model) or BranchState(SINGLE)
        for module in list(filter(_replaceable, model.modules())):
            fuse_in_place(module, state, report.channels_last)
        state.bind(model)
        model._branch_state = state  # type: ignore[assignment]
    report = replace(report, replaced=tuple(names))
    if not fuse:
        return report
    fused, reasons = fuse_forwards(model)
    norm_act = (DropInBatchNormAct2d, FusedBatchNormAct2d)
    own = {n for n, m in model.named_modules() if isinstance(m, norm_act) and m.fused}
    return replace(
        report,
        fused_relu=tuple(n for n in names if n in fused.relu | own),
        fused_add=tuple(n for n in names if n in fused.add),
        skipped={**report.skipped, **reasons},
    )


def _replaceable(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return isinstance(module, nn.BatchNorm2d) and why_not(module) is None
