"""The fast path as an engine: `TrainStep` on the configured network, its state in the reference's names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arat_fast import methods
from arat_fast.config import TrainConfig
from arat_fast.loaders.stream import Batch
from arat_fast.models.plain import plain_network
from arat_fast.nn import (
    bn_mode,
    from_authors,
    single_branch,
    synchronise_batch_norm,
    to_authors,
    use_branch,
)
from arat_fast.nn.bf16 import has_bf16_matrix_units
from arat_fast.training.adopt import adopt
from arat_fast.training.augmentation import augmented, padding_of
from arat_fast.training.build import build_fast, build_optimizer
from arat_fast.training.distributed import ALONE, World
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.precision import resolve_precision, set_float32_products
from arat_fast.training.schedule import warm_up_factor
from arat_fast.training.step import TrainStep
from arat_fast.training.teacher import load_teacher

State = dict[str, Tensor]


class FastEngine:
    """`TrainStep`: fused split BatchNorm, channels-last, mixed precision, compiled."""

    def __init__(
        self,
        config: TrainConfig,
        channels: int,
        num_classes: int,
        device: torch.device,
        world: World = ALONE,
        resumed: bool = False,
        model: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.config, self.device = config, device
        self._shape = (num_classes, channels)
        self._split = len(methods.branches_of(config)) > 1
        self._own = model is not None
        if model is None:
            teacher = None if resumed else load_teacher(config, channels, num_classes)
            self.network, self.method = build_fast(config, channels, num_classes, teacher)
        else:
            self.network, self.method = adopt(config, model, channels, num_classes)
        self.network.to(device)
        self.method.to(device)
        self.optimizer = build_optimizer(config, self.parameters(), fused=True)
        self.world = world
        synchronised = config.sync_bn and world.group is not None
        if config.sync_bn and world.group is not None:
            synchronise_batch_norm(self.network, world.group)
            synchronise_batch_norm(self.method, world.group)
        compiles = device.type == "cuda" or has_bf16_matrix_units(device)
        precision = resolve_precision(config.precision, device)
        if device.type == "cuda":
            set_float32_products(precision)
            # Inductor advises TF32 for float32 products; predictors and losses are float32 on purpose.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        self.step = TrainStep(
            self.network,
            self.method,
            self.optimizer,
            attack=config.attack,
            precision=config.precision,
            compiled=config.compile and compiles and not synchronised,
            capture=config.capture,
            padding=padding_of(config),
            flip=config.flip,
            seed=config.seed,
            world=world,
            guard=True,
            batch_size=batch_size,
        )

    @property
    def guard(self) -> FiniteGuard | None:
        """The step's."""
        return self.step.guard

    def start_epoch(self, epoch: int, rate_factor: float) -> None:
        """Set the attack's warm-up and the method's phases."""
        self.step.attack.set_radius(warm_up_factor(self.config, epoch))
        self.method.on_epoch_start(epoch, rate_factor)

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters: the network's, then predictors' or a trained teacher's."""
        return [*self.network.parameters(), *(p for p in self.method.parameters() if p.requires_grad)]

    def buffers(self) -> list[Tensor]:
        """BatchNorm statistics and the method's state."""
        return [*self.network.buffers(), *self.method.buffers()]

    def iterate(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """One training iteration."""
        self.step.seek(epoch, step)
        if batch.images.is_floating_point():  # a user's loader has augmented
            return self.step(batch.images, batch.labels)
        return self.step(batch.images, batch.labels, batch.indices, resident=batch.resident)

    @torch.no_grad()
    def set_balance(self, batches: Iterable[Batch], epoch: int) -> float | None:
        """Measure auto-balance's weight."""
        arat = self.method.base if isinstance(self.method, methods.EMR) else self.method
        if not (isinstance(arat, methods.ARAT) and arat.config.auto_balance):
            return None
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        total = 0
        branch = "clean" if self._split else "adv"
        self.step.twin.refresh()
        with use_branch(self.network, branch), bn_mode(self.network, "running"):
            for batch in batches:
                images = augmented(self.config, batch, epoch).to(self.step.dtype)
                correct += (self.step.twin.module(images).argmax(1) == batch.labels).sum()
                total += len(batch.labels)
        correct, images_seen = self.world.total(correct), total * self.world.size
        arat.a.copy_(correct / images_seen)
        return float(arat.a)

    def state(self) -> State:
        """Network and predictors in the reference's names."""
        network = self.network.state_dict()
        if not self._own:
            network = _reference_names(network)
        named = {f"network.{name}": value for name, value in network.items()}
        return named | dict(self.method.state_dict())

    def load_state(self, state: State) -> None:
        """Take over a state in the reference's names."""
        prefix = "network."
        network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        rest = {k: v for k, v in state.items() if not k.startswith(prefix)}
        renamed = self._split and not self._own
        self.network.load_state_dict(from_authors(network) if renamed else network)
        self.method.load_state_dict(rest)

    def plain_network(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """The reference network with the present parameters, or those given; of a user's network a copy."""
        if self._own:
            copied = copy.deepcopy(self.network)
            copied.load_state_dict(self.network.state_dict() | (weights or {}))
            return copied
        state = self.network.state_dict() | (weights or {})
        plain = plain_network(self.config.model, *self._shape, self._split)
        plain.load_state_dict(_reference_names(state))
        return plain.to(self.device)


def _reference_names(state: State) -> State:
    branches = {v.shape[0] for k, v in state.items() if k.endswith("running_mean") and v.ndim == 2}
    if not branches:  # a network without BatchNorm2d
        return dict(state)
    return to_authors(state) if branches == {2} else single_branch(state, "adv", ("adv",))
