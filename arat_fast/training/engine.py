"""What runs an iteration: the reference, slow and plain, or the fast path. The same run directory serves
both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.loaders.stream import Batch
from arat_fast.training.distributed import ALONE, World
from arat_fast.training.fast_engine import FastEngine
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.reference_engine import ReferenceEngine

State = dict[str, Tensor]


class Engine(Protocol):
    """One configured network, method and optimizer, and how they take a step."""

    network: nn.Module
    optimizer: torch.optim.SGD

    @property
    def guard(self) -> FiniteGuard | None:
        """What watches for non-finite losses, once there has been an iteration."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters: the network's, then the predictors'."""
        ...

    def buffers(self) -> list[Tensor]:
        """BatchNorm statistics and the method's state."""
        ...

    def iterate(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """One guarded training iteration; 0-d metrics on the device, valid until the next. `step` numbers
        iterations over the whole run.
        """
        ...

    def start_epoch(self, epoch: int, rate_factor: float) -> None:
        """Set what depends on the epoch: attack warm-up, the method's phases."""
        ...

    def set_balance(self, batches: Iterable[Batch], epoch: int) -> float | None:
        """Measure auto-balance's weight on the epoch's first batches; None where the method has none."""
        ...

    def state(self) -> State:
        """Network and predictors in the reference's names, whatever runs them."""
        ...

    def load_state(self, state: State) -> None:
        """Take over what `state` gave. Raises RuntimeError or KeyError when it does not fit."""
        ...

    def plain_network(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """The reference network with the present parameters, or those given by this network's names."""
        ...


def build_engine(
    config: TrainConfig,
    channels: int,
    num_classes: int,
    device: torch.device,
    world: World = ALONE,
    *,
    resumed: bool = False,
    model: nn.Module | None = None,
    batch_size: int | None = None,
) -> Engine:
    """The configured engine; `resumed`: a checkpoint follows, and no other run's teacher is read. `model`
    takes the place of the configured network. batch_size: images of this process's whole batches.

    Raises UserError for an unknown layer to tap, a teacher that is missing or does not fit, or a reference
    engine with what it does not know, or that several processes should share.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay the same; as in every benchmark
    if config.engine == "reference":
        if model is not None:
            raise UserError("engine reference trains its own networks; use engine fast for yours")
        if world.size > 1:
            raise UserError("--engine reference runs in one process; use --engine fast with torchrun")
        return ReferenceEngine(config, channels, num_classes, device)
    return FastEngine(config, channels, num_classes, device, world, resumed, model, batch_size)
