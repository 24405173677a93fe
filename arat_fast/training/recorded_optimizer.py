"""The optimizer of a captured iteration: what a replay would not see is copied there, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RecordedOptimizer:
    """What a graph recorded of an optimizer; `follow()` before every replay.

    Replays read learning rates from device tensors. All other settings, and which parameters are trained, are
    those of the recording.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._groups = optimizer, optimizer.param_groups
        names = optimizer.defaults.keys() - {"lr"}
        self._recorded: list[tuple[Tensor, dict[str, Any], list[bool]]] = [
            (group["lr"], {name: group[name] for name in sorted(names)}, _trained(group))
            for group in self._groups
        ]

    @torch.no_grad()
    def follow(self) -> None:
        """Copy learning rates that were set as numbers into the recorded tensors.

        Raises ValueError, with nothing changed, for another setting changed, a parameter frozen or thawed,
        and for groups replaced or added.
        """
        groups = self.optimizer.param_groups
        if groups is not self._groups or len(groups) != len(self._recorded):
            raise ValueError(
                "the optimizer's groups are not those of the recorded CUDA graph (load_state_dict, "
                "add_param_group): load and add before the first iteration, or make a new TrainStep"
            )
        for group, (_, settings, trained) in zip(groups, self._recorded, strict=True):
            for name, value in settings.items():
                now = group[name]
                if now is not value and (
                    isinstance(value, Tensor) or isinstance(now, Tensor) or now != value
                ):
                    raise ValueError(
                        f"the optimizer's {name} is {now}; the recorded CUDA graph has {value}, and only the "
                        "learning rate may change: make a new TrainStep, or one with capture=False"
                    )
            if _trained(group) != trained:
                raise ValueError(
                    "requires_grad of a parameter is not what the recorded CUDA graph has: make a new "
                    "TrainStep, or one with capture=False"
                )
        # Read before any is written: two groups may have changed tensors.
        new = [float(lr) if (lr := group["lr"]) is not rate else None for group, rate in self._rates()]
        for (group, rate), value in zip(self._rates(), new, strict=True):
            if value is not None:
                rate.fill_(value)
                group["lr"] = rate

    def _rates(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [
            (g, rate) for g, (rate, _, _) in zip(self.optimizer.param_groups, self._recorded, strict=True)
        ]


def _trained(group: dict[str, Any]) -> list[bool]:
    return [parameter.requires_grad for parameter in group["params"]]
