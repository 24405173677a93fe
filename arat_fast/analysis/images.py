"""The images that a run is analysed on: test images under its evaluation attack, training batches under its
training attack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import AttackConfig, TrainConfig, resolved_attack
from arat_fast.errors import UserError
from arat_fast.evaluation.accuracy import batches
from arat_fast.evaluation.network import TrainedNetwork
from arat_fast.loaders.choose import open_stream
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.stream import counter_seed
from arat_fast.training.augmentation import augmented

NORMAL_START = 0.001  # standard deviation of the `normal` start, in pixel units


def check_fits(trained: TrainedNetwork, data: ImageSource) -> None:
    """Raise UserError unless the images have the shape and classes that the network was trained on."""
    shape, classes = (
        tuple(trained.checkpoint_state["image_shape"]),
        trained.checkpoint_state["num_classes"],
    )
    if data.image_shape != shape or data.num_classes != classes:
        raise UserError(
            f"{trained.run} was trained on images of {shape} in {classes} classes; {data.source} has "
            f"{data.image_shape} in {data.num_classes}"
        )


def attacked_batches(
    trained: TrainedNetwork, data: ImageSet, *, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x, x', labels) of the data in its order, x' by the run's evaluation attack.

    PGD against the inference branch with running statistics, as `arat-fast evaluate` measures; images in
    [0, 1], (N, C, H, W). With eps = 0 x' is x.
    """
    settings = trained.config.evaluation
    for offset, images, labels in batches(data, settings.batch_size, device):
        if settings.eps == 0:
            yield images, images, labels
            continue
        generator = torch.Generator(device).manual_seed(counter_seed(seed, 0, offset))
        x_adv = reference.pgd(
            trained.network,
            images,
            labels,
            eps=settings.eps,
            alpha=settings.alpha,
            steps=settings.steps,
            norm=settings.norm,
            start=reference.random_start(images, settings.eps, settings.norm, generator),
            batch_statistics=False,
        )
        yield images, x_adv, labels


def training_batches(
    config: TrainConfig, train: ImageSource, *, epoch: int, count: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` batches of an epoch as the run trains on them: shuffled, cropped and flipped, in
    [0, 1].
    """
    train = train.first(config.limit_train)
    if config.validation:
        train, _ = train.split(config.validation, config.seed)
    # Whatever loader trained: all give the same batches, and another machine may lack that one.
    stream = open_stream("auto", train, batch_size=config.batch_size, seed=config.seed, device=device)
    for batch in itertools.islice(stream.epoch(epoch), count):
        yield augmented(config, batch, epoch).contiguous(), batch.labels


def attack_as_trained(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    method: str,
    generator: torch.Generator,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(centre, x'): the configured training attack; nothing of the network is changed.

    The centre is `images`, but for `aliased_start`, where the start is added to the batch itself. `scale` is
    the share of eps and alpha that a warm-up has reached.
    """
    attack = resolved_attack(attack, method)
    eps, start = attack.eps * scale, None
    if attack.start == "uniform":
        start = reference.random_start(images, eps, attack.norm, generator)
    elif attack.start == "normal":
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        start = NORMAL_START * noise
    if attack.aliased_start and start is not None:
        images, start = images + start, None
    x_adv = reference.pgd(
        network,
        images,
        labels,
        eps=eps,
        alpha=attack.alpha * scale,
        steps=attack.steps,
        norm=attack.norm,
        start=start,
        clamp_start=attack.start != "normal",
        loss=attack.loss,
        branch=attack.branch,
        batch_statistics=attack.bn == "batch",
        update_statistics=False,
    )
    return images, x_adv
