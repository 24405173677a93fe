"""Split-BN weights in the layouts of others: state_dict in, state_dict out, no model needed.

Ours is stacked: `bn1.weight` (branches, C), `bn1.num_batches_tracked` (branches,). A 2-d `running_mean` marks
a split BN, since no other module has one. The ARAT authors keep a BatchNorm2d a branch under its name:
`bn1.clean.weight`, `bn1.adv.weight`. timm's split BN keeps the first part of the batch in the layer itself
and the others beside it: `bn1.weight`, `bn1.aux_bn.0.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["from_authors", "from_timm", "single_branch", "to_authors", "to_timm"]

StateDict = dict[str, Tensor]
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
Named = Callable[[str, str, int], str]  # (layer prefix with its dot, entry, branch number) -> key


def _authors(branches: Sequence[str]) -> Named:
    return lambda prefix, entry, k: f"{prefix}{branches[k]}.{entry}"


def _timm(prefix: str, entry: str, k: int) -> str:
    return f"{prefix}{entry}" if k == 0 else f"{prefix}aux_bn.{k - 1}.{entry}"


def _stack(
    state_dict: Mapping[str, Tensor], prefixes: Sequence[str], named: Named, branches: int
) -> StateDict:
    """`state_dict` with each layer's branches stacked, where its first branch's entry was."""
    stacked: dict[str, tuple[str, Tensor]] = {}
    used: set[str] = set()
    for prefix in prefixes:
        for entry in _ENTRIES:
            keys = [named(prefix, entry, k) for k in range(branches)]
            missing = [key for key in keys if key not in state_dict]
            if missing:
                raise ValueError(f"state_dict has no {missing[0]}; expected {branches} branches of {entry}")
            stacked[keys[0]] = (prefix + entry, torch.stack([state_dict[key] for key in keys]))
            used.update(keys)
    result: StateDict = {}
    for key, value in state_dict.items():
        if key in stacked:
            name, tensor = stacked[key]
            result[name] = tensor
        elif key not in used:
            result[key] = value
    return result


def _unstack(
    state_dict: Mapping[str, Tensor], named: Named, keep: Sequence[int] | None, branches: int
) -> StateDict:
    """The inverse of `_stack`; of the branches in `keep` only."""
    prefixes = [
        key.removesuffix("running_mean")
        for key, value in state_dict.items()
        if (key == "running_mean" or key.endswith(".running_mean")) and value.ndim == 2
    ]
    if not prefixes:
        raise ValueError("state_dict has no split BN: no running_mean is 2-d, branches by channels")
    split = {prefix + entry: (prefix, entry) for prefix in prefixes for entry in _ENTRIES}
    result: StateDict = {}
    for key, value in state_dict.items():
        if key not in split:
            result[key] = value
            continue
        if value.shape[0] != branches:
            raise ValueError(f"{key} has {value.shape[0]} branches; expected {branches}")
        prefix, entry = split[key]
        for k in range(branches) if keep is None else keep:
            result[named(prefix, entry, k)] = value[k].clone()
    return result


def from_authors(state_dict: Mapping[str, Tensor], branches: Sequence[str] = ("clean", "adv")) -> StateDict:
    """Stack the ARAT authors' layout (`bn1.clean.weight` …); other keys stay. ValueError without any."""
    end = f"{branches[0]}.running_mean"
    prefixes = [key.removesuffix(end) for key in state_dict if key == end or key.endswith("." + end)]
    if not prefixes:
        raise ValueError(f"state_dict has no key that ends in .{end}; expected the authors' split BN")
    return _stack(state_dict, prefixes, _authors(branches), len(branches))


def to_authors(state_dict: Mapping[str, Tensor], branches: Sequence[str] = ("clean", "adv")) -> StateDict:
    """The inverse of `from_authors`."""
    return _unstack(state_dict, _authors(branches), None, len(branches))


def from_timm(state_dict: Mapping[str, Tensor], branches: int = 2) -> StateDict:
    """Stack timm's split-BN layout (`bn1.weight`, `bn1.aux_bn.0.weight` …), first split first.

    ValueError without such layers, or when they have another number of splits.
    """
    end = "aux_bn.0.running_mean"
    prefixes = [key.removesuffix(end) for key in state_dict if key == end or key.endswith("." + end)]
    if not prefixes:
        raise ValueError(f"state_dict has no key that ends in .{end}; expected timm's split BN")
    extra = [key for key in state_dict if f"aux_bn.{branches - 1}." in key]
    if extra:
        raise ValueError(f"state_dict has {extra[0]}; expected {branches} splits")
    return _stack(state_dict, prefixes, _timm, branches)


def to_timm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The inverse of `from_timm`, for as many branches as there are."""
    stacked = [v for k, v in state_dict.items() if k.endswith("running_mean") and v.ndim == 2]
    return _unstack(state_dict, _timm, None, stacked[0].shape[0] if stacked else 0)


def single_branch(
    state_dict: Mapping[str, Tensor], branch: str, branches: Sequence[str] = ("clean", "adv")
) -> StateDict:
    """The state_dict of the plain single-BN model that one branch is. ValueError for an unknown branch."""
    if branch not in branches:
        raise ValueError(f"branch is {branch!r}; expected one of {tuple(branches)}")
    plain: Named = lambda prefix, entry, _: prefix + entry  # noqa: E731
    return _unstack(state_dict, plain, [list(branches).index(branch)], len(branches))
