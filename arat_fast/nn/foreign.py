"""State_dicts of other programs under this project's names: no file is read here, no model needed.

What differs from program to program is the wrapper's prefix (`module.`, `model.`), where split BN keeps its
branches, and the names of CIFAR networks' parts. Prefixes and branches are found by the names alone; parts
are renamed only where the network asked for has no such name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from .checkpoints import StateDict, from_authors, from_timm

__all__ = ["split_branches", "under_our_names"]

# DataParallel and torch's AveragedModel; torch.compile; the ARAT authors' feature extractor and RobustBench's
# wrappers; this project's checkpoints; attack wrappers of the pytorch-cifar family.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.", "basic_net.")
_NO_WEIGHTS = ("n_averaged",)  # AveragedModel's counter
# The first release of the ARAT code called the branches base and base_adv.
_AUTHORS_BRANCHES = (("clean", "adv"), ("base", "base_adv"))
_PARTS = (
    (re.compile(r"^(block\d+)\.layer\.(\d+)\."), r"\1.\2."),  # WideResNets of the TRADES line
    (re.compile(r"\.convShortcut\."), ".shortcut."),
    (re.compile(r"\.shortcut\.0\."), ".shortcut."),  # pytorch-cifar: Sequential(convolution, BN)
    (re.compile(r"\.shortcut\.1\."), ".shortcut_bn."),
    (re.compile(r"^fc\."), "linear."),
)
_UNUSED = "sub_block1."  # TRADES' WideResNet holds a group that its forward never calls


def _without_wrappers(state_dict: Mapping[str, Tensor], wanted: Collection[str]) -> StateDict:
    state = {key: value for key, value in state_dict.items() if key not in _NO_WEIGHTS}
    while True:
        prefix = next(
            (
                p
                for p in _WRAPPERS
                if state and all(k.startswith(p) for k in state) and not any(k.startswith(p) for k in wanted)
            ),
            None,
        )
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def _stacked(state: StateDict) -> StateDict:
    """Split BN of any known layout stacked as ours; a state_dict without stays as it is."""
    for branches in _AUTHORS_BRANCHES:
        if all(any(key.endswith(f".{name}.running_mean") for key in state) for name in branches):
            return from_authors(state, branches)
    if any(".aux_bn." in f".{key}" for key in state):
        return from_timm(state)
    return state


def split_branches(state_dict: Mapping[str, Tensor]) -> int:
    """How many branches the split BN of a stacked state_dict has; 0 without."""
    means = (v for k, v in state_dict.items() if k.endswith("running_mean") and v.ndim == 2)
    return next((mean.shape[0] for mean in means), 0)


def under_our_names(state_dict: Mapping[str, Tensor], wanted: Collection[str]) -> StateDict:
    """`state_dict` by the names of `wanted`, the keys of a network of ours, as far as they are known.

    Takes the ARAT authors' checkpoints (both releases), timm's split BN, plain networks of pytorch-cifar and
    of the TRADES line, and ours. Split BN comes out stacked, clean branch first. What has no counterpart in
    `wanted` keeps its name. Raises ValueError for split BN with an entry missing or another number of parts.
    """
    state = _stacked(_without_wrappers(state_dict, wanted))
    result: StateDict = {}
    for key, value in state.items():
        name = key
        if name not in wanted:
            for pattern, replacement in _PARTS:
                name = pattern.sub(replacement, name)
        if name.startswith(_UNUSED) and name not in wanted:
            continue
        result[name if name in wanted else key] = value
    return result
