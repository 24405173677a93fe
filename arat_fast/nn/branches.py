"""Turn a model's BatchNorm2d into split BN and back, and choose branch and statistics for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .branch_state import BranchState, Statistics, shared_state
from .fused_batch_norm import FusedBatchNorm2d
from .split_batch_norm import SplitBatchNorm2d

__all__ = ["bind_branches", "bn_mode", "convert_split_bn", "revert_split_bn", "use_branch"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
SplitT = TypeVar("SplitT", bound=SplitBatchNorm2d)
BATCH_NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class _Chosen:
    """A choice that holds from the call on; as a context manager, until its end."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()


def _split_layers(model: nn.Module) -> list[SplitBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]


def bind_branches(model: nn.Module) -> BranchState:
    """The state that all split BNs of `model` share; the first call walks the modules, later ones look it up.

    Models built of `SplitBatchNorm2d` by hand call this once on the whole model, so that running statistics
    are updated together when its forward ends. `convert_split_bn` has done it. Call it again after adding
    layers.

    Raises:
        ValueError: without split BN, or when layers have different branches.
    """
    layers = _split_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SplitBatchNorm2d; convert it with convert_split_bn(model)"
        )
    names = {layer.branches for layer in layers}
    if len(names) > 1:
        raise ValueError(
            f"split BN layers have different branches: {sorted(names)}; expected the same in all"
        )
    state = layers[0].state
    if any(layer.state is not state for layer in layers):
        state.unbind(model)  # it may be bound to a part of this model
        for layer in layers:
            layer.state = state
    state.bind(model)
    model._branch_state = state  # type: ignore[assignment]
    return state


def _state(model: nn.Module) -> BranchState:
    return shared_state(model) or bind_branches(model)


def use_branch(model: nn.Module, branch: str, parts: int = 1) -> _Chosen:
    """Choose the branch of every split BN: a name, or "both": the batch is the branches' equal parts.

        use_branch(model, "both")               # from here on
        with use_branch(model, "adv"): ...      # and back to what it was

    parts: the batch is that many equal parts for this one branch, each with batch statistics of its own, as
    if they came one after the other.

    Raises ValueError for an unknown branch or a model without split BN.
    """
    state = _state(model)
    before = (state.branch, state.parts)
    state.choose(branch, parts)
    return _Chosen(lambda: state.choose(*before))


def bn_mode(model: nn.Module, statistics: Statistics, update: bool = True) -> _Chosen:
    """Choose what split BN normalises by, whatever `model.training` says.

    Args:
        model: with split BN.
        statistics: "batch", "running", or "auto": batch statistics, with update, where `module.training`.
        update: whether "batch" also moves the running statistics of the branch in use.

    Returns:
        a context manager that restores the mode before; as a plain call it holds from here on.
    """
    state = _state(model)
    before = (state.statistics, state.update)
    state.set_mode(statistics, update)
    return _Chosen(lambda: state.set_mode(*before))


def replace_modules(model: nn.Module, build: Callable[[str, nn.Module], nn.Module | None]) -> int:
    """Replace every submodule for which `build` returns a new one; a shared module stays shared."""
    built: dict[int, nn.Module | None] = {}

    def places() -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
        for path, parent in list(model.named_modules(remove_duplicate=True)):
            for name, child in list(parent._modules.items()):
                if child is not None:
                    yield parent, name, f"{path}.{name}" if path else name, child

    for parent, name, path, child in places():
        if id(child) not in built:
            built[id(child)] = build(path, child)
        new = built[id(child)]
        if new is not None:
            setattr(parent, name, new)
    return sum(new is not None for new in built.values())


def refuse_other_batch_norms(path: str, module: nn.Module) -> None:
    """ValueError for a BatchNorm that obeys no branch or attack mode: 1d, 3d, synchronised."""
    if not isinstance(module, _BatchNorm) or isinstance(module, nn.BatchNorm2d):
        return
    if isinstance(module, nn.SyncBatchNorm):
        remedy = "make it an nn.BatchNorm2d, and call synchronise_batch_norm(model, group) after the split"
    else:
        remedy = "replace it by an nn.BatchNorm2d (features as (N, C, 1, 1)), or by LayerNorm or GroupNorm"
    kind = type(module).__name__
    raise ValueError(
        f"{path or 'the model'} is a {kind}, whose statistics no branch or attack would keep apart; {remedy}"
    )


def _split(path: str, module: nn.Module, branches: Sequence[str]) -> SplitBatchNorm2d | None:
    if isinstance(module, SplitBatchNorm2d):
        raise ValueError(f"{path or 'the model'} is split already; revert_split_bn first")
    refuse_other_batch_norms(path, module)
    if not isinstance(module, nn.BatchNorm2d):
        return None
    if type(module) not in (nn.BatchNorm2d, FusedBatchNorm2d):
        raise ValueError(
            f"{path} is a {type(module).__name__}; expected nn.BatchNorm2d itself, replace it first"
        )
    if not module.affine or module.running_mean is None or module.running_var is None:
        raise ValueError(f"{path} has no affine parameters or running statistics; expected both")
    return split_copy(module, SplitBatchNorm2d, branches)


@torch.no_grad()
def split_copy(module: nn.BatchNorm2d, kind: type[SplitT], branches: Sequence[str]) -> SplitT:
    """A `kind` whose branches are copies of an affine BatchNorm with running statistics."""
    split = kind(
        module.num_features, branches, module.eps, module.momentum, module.weight.device, module.weight.dtype
    )
    for name in BATCH_NORM_ENTRIES:
        entry = getattr(split, name)
        entry.copy_(getattr(module, name).expand_as(entry))
    split.weight.requires_grad_(module.weight.requires_grad)
    split.bias.requires_grad_(module.bias.requires_grad)
    return split.train(module.training)


def convert_split_bn(
    model: ModuleT, branches: Sequence[str] = ("clean", "adv"), *, channels_last: bool = True
) -> ModuleT:
    """Replace every `nn.BatchNorm2d` of `model`, in place, by split BN whose branches start as its copies.

    Before the optimizer is built: the BN parameters are new ones. `channels_last` also turns the model's 4-d
    parameters to channels-last, after which convolutions put out the layout that split BN asks for.

    Returns:
        the model; a new module where the model itself is a BatchNorm2d.

    Raises:
        ValueError: no BatchNorm2d, split already, a subclass of BatchNorm2d, one without affine parameters or
            running statistics, or another BatchNorm (1d, 3d, synchronised). Nothing is changed then.
    """
    for path, module in model.named_modules():
        _split(path, module, branches)  # every refusal comes before the first change
    alone = _split("", model, branches)
    if alone is not None:
        bind_branches(alone)
        return cast(ModuleT, alone)
    if not replace_modules(model, lambda path, module: _split(path, module, branches)):
        raise ValueError(f"{type(model).__name__} has no nn.BatchNorm2d to split")
    bind_branches(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@torch.no_grad()
def _plain(module: nn.Module, branch: str) -> nn.BatchNorm2d | None:
    if not isinstance(module, SplitBatchNorm2d):
        return None
    if branch not in module.branches:
        raise ValueError(f"branch is {branch!r}; expected one of {module.branches}")
    k = module.branches.index(branch)
    plain = nn.BatchNorm2d(
        module.num_features,
        module.eps,
        module.momentum,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
    for name in BATCH_NORM_ENTRIES:
        getattr(plain, name).copy_(getattr(module, name)[k])
    plain.weight.requires_grad_(module.weight.requires_grad)
    plain.bias.requires_grad_(module.bias.requires_grad)
    return plain.train(module.training)


def revert_split_bn(model: ModuleT, branch: str) -> ModuleT:
    """Replace every split BN of `model`, in place, by an `nn.BatchNorm2d` with one branch's values.

    Returns the model; a new module where the model itself is a split BN. Raises ValueError for an unknown
    branch or a model without split BN. A model whose forward passes `residual` or `relu` to its BN cannot run
    so reverted.
    """
    layers = _split_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SplitBatchNorm2d to revert")
    if branch not in layers[0].branches:
        raise ValueError(f"branch is {branch!r}; expected one of {layers[0].branches}")
    for layer in layers:
        layer.state.unbind(model)
    model.__dict__.pop("_branch_state", None)
    alone = _plain(model, branch)
    if alone is not None:
        return cast(ModuleT, alone)
    replace_modules(model, lambda _, module: _plain(module, branch))
    return model
