"""What runs an iteration: the reference, slow and plain, or the fast path. The same run directory serves
both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from arat_fast import methods, reference
from arat_fast.config import TrainConfig, resolved
from arat_fast.errors import UserError
from arat_fast.kernels.augment import random_crop_flip
from arat_fast.loaders.sources import PHOTOS
from arat_fast.loaders.stream import Batch, counter_seed
from arat_fast.models.plain import plain_network
from arat_fast.nn import (
    bn_mode,
    from_authors,
    single_branch,
    synchronise_batch_norm,
    to_authors,
    use_branch,
)
from arat_fast.nn.matrix_units import has_bf16_matrix_units
from arat_fast.training.adopt import adopt
from arat_fast.training.build import build_fast, build_method, build_network, build_optimizer
from arat_fast.training.distributed import ALONE, World
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.precision import resolve_precision, set_float32_products
from arat_fast.training.step import TrainStep
from arat_fast.training.teacher import load_teacher

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


def augmented(config: TrainConfig, batch: Batch, epoch: int) -> Tensor:
    """Cropped and flipped images (N, C, H, W) in [0, 1]: a function of (seed, epoch, index) alone.

    Float images of a user's loader are taken as they are.
    """
    if batch.images.is_floating_point():
        return batch.images.contiguous(memory_format=torch.channels_last)
    return random_crop_flip(
        batch.images,
        batch.indices,
        seed=config.seed,
        epoch=epoch,
        padding=_padding(config),
        flip=config.flip,
        resident=batch.resident,
    )


def loss_terms(metrics: dict[str, Tensor]) -> list[str]:
    """Names of the loss's terms among an iteration's metrics."""
    return [name for name in metrics if name != "loss" and not name.startswith("accuracy")]


def warm_up_factor(config: TrainConfig, epoch: int) -> float:
    """The share of eps and alpha in `epoch` (from 1): it grows linearly over the warm-up epochs."""
    return min(1.0, epoch / config.attack.warmup_epochs) if config.attack.warmup_epochs else 1.0


def _padding(config: TrainConfig) -> int:
    return 0 if config.dataset in PHOTOS else config.padding  # their loader has cropped photos


class ReferenceEngine:
    """`arat_fast.reference`, as the authors run it: eager, fp32, NCHW."""

    def __init__(self, config: TrainConfig, channels: int, num_classes: int, device: torch.device) -> None:
        self.config, self.device, self._shape = config, device, (num_classes, channels)
        _check_reference_attack(config)
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
        twin = plain_network(self.config.model, *self._shape, _split(self.config))
        twin.load_state_dict(self.network.state_dict() | weights)
        return twin.to(self.device)


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
    ) -> None:
        self.config, self.device = config, device
        self._shape = (num_classes, channels)
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
        self.step = TrainStep(
            self.network,
            self.method,
            self.optimizer,
            attack=config.attack,
            precision=precision,
            compiled=config.compile and compiles and not synchronised,
            capture=config.capture,
            padding=_padding(config),
            flip=config.flip,
            seed=config.seed,
            world=world,
            guard=True,
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
        branch = "clean" if _split(self.config) else "adv"
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
        renamed = _split(self.config) and not self._own
        self.network.load_state_dict(from_authors(network) if renamed else network)
        self.method.load_state_dict(rest)

    def plain_network(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """The reference network with the present parameters, or those given; of a user's network a copy."""
        if self._own:
            copied = copy.deepcopy(self.network)
            copied.load_state_dict(self.network.state_dict() | (weights or {}))
            return copied
        state = self.network.state_dict() | (weights or {})
        plain = plain_network(self.config.model, *self._shape, _split(self.config))
        plain.load_state_dict(_reference_names(state))
        return plain.to(self.device)


def build_engine(
    config: TrainConfig,
    channels: int,
    num_classes: int,
    device: torch.device,
    world: World = ALONE,
    *,
    resumed: bool = False,
    model: nn.Module | None = None,
) -> Engine:
    """The configured engine; `resumed`: a checkpoint follows, and no other run's teacher is read. `model`
    takes the place of the configured network.

    Raises UserError for an unknown layer to tap, a teacher that is missing or does not fit, or a reference
    engine with what it does not know, or that several processes should share.
    """
    if config.engine == "reference":
        if model is not None:
            raise UserError("engine reference trains its own networks; use engine fast for yours")
        if world.size > 1:
            raise UserError("--engine reference runs in one process; use --engine fast with torchrun")
        return ReferenceEngine(config, channels, num_classes, device)
    return FastEngine(config, channels, num_classes, device, world, resumed, model)


def _check_reference_attack(config: TrainConfig) -> None:
    attack = resolved(config).attack
    for name, value, known in (("loss", attack.loss, "ce"), ("branch", attack.branch, "adv")):
        if value != known:
            raise UserError(f"--engine reference attacks with {name} {known}, not {value}: use --engine fast")
    if attack.start == "normal":
        raise UserError("--engine reference starts uniformly or at the image: use --engine fast")


def _split(config: TrainConfig) -> bool:
    return len(methods.branches_of(config)) > 1


def _reference_names(state: State) -> State:
    branches = {v.shape[0] for k, v in state.items() if k.endswith("running_mean") and v.ndim == 2}
    if not branches:  # a network without BatchNorm2d
        return dict(state)
    return to_authors(state) if branches == {2} else single_branch(state, "adv", ("adv",))
