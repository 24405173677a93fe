"""Averages of the weights: SWA as the ARAT paper's variant runs it, EMA, and BatchNorm recalibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arat_fast.analysis.images import attack_as_trained
from arat_fast.config import TrainConfig
from arat_fast.loaders.stream import Batch, counter_seed
from arat_fast.reference import use_branch
from arat_fast.training.augmentation import augmented


class WeightAverage:
    """An average of a network's parameters: equal weights (SWA) or exponentially fading ones (EMA).

    Buffers are not averaged: BatchNorm statistics belong to the weights they were measured with
    (`recalibrate`).
    """

    def __init__(self, network: nn.Module, decay: float | None = None) -> None:
        self.decay = decay
        self.count = 0
        self.values = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the network's present parameters into the average. The first snapshot of an SWA is taken
        whole.
        """
        weight = 1 - self.decay if self.decay is not None else 1 / (self.count + 1)
        parameters = [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(list(self.values.values()), parameters, weight)
        self.count += 1

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Put the average into the network's parameters."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, object]:
        """The averaged parameters and how many updates made them."""
        return {"count": self.count, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave."""
        count, values = state["count"], state["values"]
        assert isinstance(count, int)
        assert isinstance(values, dict)
        self.count = count
        for name, value in self.values.items():
            value.copy_(values[name])


def swa_due(start: int, every: int, epoch: int, batch: int, batches: int) -> bool:
    """Whether the iteration ends in a snapshot: from epoch `start` (from 1), step epoch * batches + batch %
    every == 0.

    `batch` counts from 0. The paper's schedule (76, 500, 391 batches, 100 epochs) gives 19 snapshots.
    """
    return start > 0 and epoch >= start and (epoch * batches + batch) % every == 0


@contextmanager
def _cumulative(norms: Iterable[nn.BatchNorm2d]) -> Iterator[Callable[[int, int], None]]:
    """Reset the BatchNorms and give a function that sets the next forward's weight: n new images after
    `seen`.
    """
    norms = list(norms)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()

    def weigh(seen: int, n: int) -> None:
        for norm in norms:
            norm.momentum = n / (seen + n)

    try:
        yield weigh
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def adversarial_images(
    config: TrainConfig, network: nn.Module, batches: Iterable[Batch], epoch: int
) -> Iterator[Tensor]:
    """An epoch's images to recalibrate by: attacked as in training, clean ones of method standard.

    Loss, start, branch and radius are the run's; BatchNorm has the batch's statistics even where the run
    attacks with running ones, which are what is being measured here. Attack forwards leave those alone; in
    the ARAT authors' code they enter too.
    """
    attack = dataclasses.replace(config.attack, bn="batch")
    for k, batch in enumerate(batches):
        images = augmented(config, batch, epoch).contiguous()
        if config.method == "standard":
            yield images
            continue
        generator = torch.Generator(images.device).manual_seed(counter_seed(config.seed, epoch, k))
        _, x_adv = attack_as_trained(network, images, batch.labels, attack, config.method, generator)
        yield x_adv


def recalibrate(network: nn.Module, batches: Iterable[Tensor], branch: str = "adv") -> None:
    """Measure the branch's BatchNorm statistics anew: image-weighted means of the batches' means and unbiased
    variances.

    batches: images (N, C, H, W), adversarial ones for ARAT's adv branch; they may be made with the same
    network as long as the maker leaves its statistics alone. The other branch is not touched. Modes are put
    back.
    """
    norms = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and (not name.endswith((".clean", ".adv")) or name.endswith(f".{branch}"))
    ]
    modes = [(m, m.training) for m in network.modules()]
    use_branch(network, branch)
    seen = 0
    with _cumulative(norms) as weigh:
        for images in batches:
            network.train()
            weigh(seen, len(images))
            with torch.no_grad():
                network(images)
            seen += len(images)
    for module, training in modes:
        module.training = training
