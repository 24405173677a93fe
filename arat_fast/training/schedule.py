"""The learning rate of an epoch."""

from __future__ import annotations

from arat_fast.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of `epoch` (from 1).

    With the defaults, as the ARAT authors' schedule really ran (their scheduler lags one epoch): 0.02 in
    epoch 1,
    0.1 to epoch 76, 0.01 to epoch 91, 0.001 to epoch 100.
    """
    if epoch == 1 and config.first_epoch_learning_rate is not None:
        return config.first_epoch_learning_rate
    return config.learning_rate * 0.1 ** sum(epoch >= drop for drop in config.drops)
