"""Which branch and which statistics the split BNs of one model use, kept in one object that they share.

Choosing a branch is then one assignment, not a walk over `model.modules()`; and the running statistics of all
layers are updated together, one foreach call a forward, when the model's forward ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["BOTH", "BranchState", "Statistics", "update_running_statistics"]

Statistics = Literal["auto", "batch", "running"]
STATISTICS: tuple[Statistics, ...] = ("auto", "batch", "running")
BOTH = "both"


class _Layer(Protocol):
    """Statistics (branches, C) and counters (branches,), or (C,) and a number as `nn.BatchNorm2d`."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None


class _Update(NamedTuple):
    layer: _Layer
    branch: int | None
    mean: Tensor
    var: Tensor
    rows: int  # of each part


class BranchState:
    """The choices of one model.

    Attributes:
        branches: their names, in the order of the parameters' first dimension.
        branch: one of them, or "both": the batch is the branches' equal parts in order.
        index: the branch's place, None for "both".
        group: of the processes over which batch statistics are taken; None: this one alone.
        parts: into how many equal parts the batch falls, each normalised by batch statistics of its own.
        statistics: "batch", "running", or "auto": batch statistics where `module.training`, as
        `nn.BatchNorm2d`. update: whether batch statistics flow into the running ones.
    """

    def __init__(self, branches: Sequence[str]) -> None:
        if isinstance(branches, str):
            raise TypeError(f"branches is {branches!r}; expected names in a tuple, such as ({branches!r},)")
        if not branches or len(set(branches)) != len(branches) or BOTH in branches:
            raise ValueError(f"branches is {tuple(branches)}; expected different names other than {BOTH!r}")
        self.branches = tuple(branches)
        self.statistics: Statistics = "auto"
        self.update = True
        self._pending: list[_Update] | None = None
        self.branch = self.branches[-1]  # ARAT's inference branch, adv
        self.index: int | None = len(self.branches) - 1
        self.parts = 1
        self.group: Any = None

    def choose(self, branch: str, parts: int = 1) -> None:
        """Set branch and parts. Raises ValueError for an unknown branch, or parts of "both"."""
        if branch != BOTH and branch not in self.branches:
            raise ValueError(f"branch is {branch!r}; expected one of {(*self.branches, BOTH)}")
        if parts < 1 or (branch == BOTH and parts != 1):
            raise ValueError(f"parts is {parts} of branch {branch!r}; expected 1 or more, 1 for {BOTH!r}")
        self.branch, self.parts = branch, parts
        self.index = None if branch == BOTH else self.branches.index(branch)

    def set_mode(self, statistics: Statistics, update: bool) -> None:
        """Set the BN mode. Raises ValueError for an unknown one."""
        if statistics not in STATISTICS:
            raise ValueError(f"statistics is {statistics!r}; expected one of {STATISTICS}")
        self.statistics = statistics
        self.update = update

    def record(self, layer: _Layer, index: int | None, mean: Tensor, var: Tensor, rows: int) -> None:
        """Take a layer's batch statistics: now, or with the other layers' when the model's forward ends."""
        if self._pending is None:
            update_running_statistics(layer, index, mean, var, rows)
        else:
            self._pending.append(_Update(layer, index, mean, var, rows))

    def bind(self, model: nn.Module) -> None:
        """Update running statistics together when the forward of `model` ends, unless a part does so."""
        # The hooks know the state and not the other way: a handle would not survive the copy of a part of a
        # model.
        if not any(self in _states(module._forward_hooks) for module in model.modules()):
            model.register_forward_pre_hook(self.begin)
            model.register_forward_hook(self.end)

    def unbind(self, model: nn.Module) -> None:
        """Update each layer's running statistics at once again."""
        for module in model.modules():
            hook_dicts: tuple[dict[int, Any], ...] = (module._forward_hooks, module._forward_pre_hooks)
            for hooks in hook_dicts:
                for number, state in zip(list(hooks), _states(hooks), strict=True):
                    if state is self:
                        del hooks[number]
        self._pending = None

    def begin(self, _module: object, _inputs: object) -> None:
        """Forward pre-hook of the model: collect from here. What an interrupted forward left is dropped."""
        self._pending = []

    def end(self, _module: object, _inputs: object, _output: object) -> None:
        """Forward hook of the model: one update for all layers."""
        pending, self._pending = self._pending, None
        if pending:
            _update_running_statistics(pending)


def update_running_statistics(layer: _Layer, index: int | None, mean: Tensor, var: Tensor, rows: int) -> None:
    """Take one layer's batch statistics now."""
    _update_running_statistics([_Update(layer, index, mean, var, rows)])


@torch.no_grad()
def _update_running_statistics(updates: Sequence[_Update]) -> None:
    """running ← (1 − momentum)·running + momentum·batch with the unbiased variance, as `nn.BatchNorm2d`."""
    by_momentum: dict[float | None, list[_Update]] = {}
    for update in updates:
        by_momentum.setdefault(update.layer.momentum, []).append(update)
    for momentum, group in by_momentum.items():
        counters = [_part(u.layer.num_batches_tracked, u.branch) for u in group]
        running = [_row(u.layer.running_mean, u.branch) for u in group]
        running += [_row(u.layer.running_var, u.branch) for u in group]
        batch = [u.mean for u in group]
        batch += torch._foreach_mul([u.var for u in group], [u.rows / (u.rows - 1) for u in group])
        for rows in _each_part(batch, running):
            torch._foreach_add_(counters, 1)
            if momentum is not None:
                torch._foreach_lerp_(running, rows, momentum)
                continue
            # Cumulative average; a device tensor, so that nothing is read back.
            weights = [(1.0 / counter).to(running[0].dtype).view(-1, 1) for counter in counters] * 2
            for old, new, weight in zip(running, rows, weights, strict=True):
                old.lerp_(new, weight.expand_as(new))


def _each_part(batch: list[Tensor], running: list[Tensor]) -> list[list[Tensor]]:
    """The statistics of one update after the other: a branch's parts update its one row in turn."""
    if batch[0].shape[0] == running[0].shape[0]:
        return [batch]
    return [[value[k : k + 1] for value in batch] for k in range(batch[0].shape[0])]


def _states(hooks: Mapping[int, Any]) -> list[object]:
    return [getattr(hook, "__self__", None) for hook in hooks.values()]


def _part(tensor: Tensor, index: int | None) -> Tensor:
    return tensor if index is None else tensor.narrow(0, index, 1)


def _row(tensor: Tensor, index: int | None) -> Tensor:
    return _part(tensor if tensor.ndim == 2 else tensor.unsqueeze(0), index)


def shared_state(model: Any) -> BranchState | None:
    """The state cached on `model` by `bind_branches`, if any."""
    state = getattr(model, "_branch_state", None)
    return state if isinstance(state, BranchState) else None
