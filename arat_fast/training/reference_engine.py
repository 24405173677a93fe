"""The reference as an engine: `arat_fast.reference`, with the run's batches, checkpoints and guard."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import TrainConfig
from arat_fast.loaders.stream import Batch, counter_seed
from arat_fast.methods import branches_of
from arat_fast.models.plain import plain_network
from arat_fast.training.augmentation import augmented
from arat_fast.training.build import build_method, build_network, build_optimizer, check_reference
from arat_fast.training.finite import FiniteGuard, loss_terms
from arat_fast.training.schedule import warm_up_factor

State = dict[str, Tensor]


class ReferenceEngine:
    """`arat_fast.reference`, as the authors run it: eager, fp32, NCHW."""

    def __init__(self, config: TrainConfig, channels: int, num_classes: int, device: torch.device) -> None:
        self.config, self.device, self._shape = config, device, (num_classes, channels)
        self._split = len(branches_of(config)) > 1
        check_reference(config)
        self.method = build_method(config, build_network(config, channels, num_classes)).to(device)
        self.network = self.method.network
        self.optimizer = build_optimizer(config, self.parameters())
        self.guard: FiniteGuard | None = None
        self._radius = 1.0

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        return list(self.method.parameters())

    def buffers(self) -> list[Tensor]:
        """BatchNorm statistics and the method's state."""
        return list(self.method.buffers())

    def iterate(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """One training iteration."""
        if self.guard is None:
            momenta = [s["momentum_buffer"] for s in self.optimizer.state.values()]
            self.guard = FiniteGuard([p.detach() for p in self.parameters()], [*self.buffers(), *momenta])
        self.guard.before()
        metrics = self._train_step(batch, epoch, step)
        self.guard.after([metrics[name] for name in loss_terms(metrics)], step)
        return metrics

    def start_epoch(self, epoch: int, rate_factor: float) -> None:
        """Set the attack's warm-up."""
        self._radius = warm_up_factor(self.config, epoch)

    def _train_step(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        attack = self.config.attack
        generator = torch.Generator(self.device).manual_seed(counter_seed(self.config.seed, step))
        return reference.train_step(
            self.method,
            self.optimizer,
            augmented(self.config, batch, epoch).contiguous(),
            batch.labels,
            eps=attack.eps * self._radius,
            alpha=attack.alpha * self._radius,
            steps=attack.steps,
            norm=attack.norm,
            random=attack.start != "none",
            batch_statistics=attack.bn == "batch",
            aliased_start=attack.aliased_start,
            generator=generator,
        )

    def set_balance(self, batches: Iterable[Batch], epoch: int) -> float | None:
        """Measure auto-balance's weight."""
        if not (isinstance(self.method, reference.ARAT) and self.method.auto_balance):
            return None
        return self.method.balance((augmented(self.config, b, epoch).contiguous(), b.labels) for b in batches)

    def state(self) -> State:
        """Network and predictors."""
        return self.method.state_dict()

    def load_state(self, state: State) -> None:
        """Take over a state."""
        self.method.load_state_dict(state)

    def plain_network(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """A copy of the network with the given weights; the network itself without."""
        if weights is None:
            return self.network
        twin = plain_network(self.config.model, *self._shape, self._split)
        twin.load_state_dict(self.network.state_dict() | weights)
        return twin.to(self.device)
