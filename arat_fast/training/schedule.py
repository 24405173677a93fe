"""What changes from epoch to epoch: the learning rate, and the attack's radius while it warms up."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_fast.config import TrainConfig


def rate_factor(config: TrainConfig, epoch: int) -> float:
    """By how much the drops have lowered the learning rate of `epoch` (from 1): 1, 0.1, 0.01…"""
    return 0.1 ** sum(epoch >= drop for drop in config.drops)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of `epoch` (from 1).

    With the defaults, as the ARAT authors' schedule really ran (their scheduler lags one epoch): 0.02 in
    epoch 1, 0.1 to epoch 76, 0.01 to epoch 91, 0.001 to epoch 100.
    """
    if epoch == 1 and config.first_epoch_learning_rate is not None:
        return config.first_epoch_learning_rate
    return config.learning_rate * rate_factor(config, epoch)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate: in place where it is a tensor, which a captured graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def warm_up_factor(config: TrainConfig, epoch: int) -> float:
    """The share of eps and alpha in `epoch` (from 1): it grows linearly over the warm-up epochs."""
    return min(1.0, epoch / config.attack.warmup_epochs) if config.attack.warmup_epochs else 1.0
