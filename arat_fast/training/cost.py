"""What an iteration costs: parameters, arithmetic, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arat_fast import methods
from arat_fast.config import TrainConfig, resolved_attack
from arat_fast.models.plain import plain_network
from arat_fast.training.build import build_fast


@dataclass(frozen=True)
class Cost:
    """Arithmetic counts a multiply-add as two operations; an input gradient costs a forward, weights'
    another, and an input gradient's own gradient in the weights two.
    """

    parameters: int
    predictor_parameters: int
    forward_flop: int  # one image, one forward
    forwards: int  # an iteration
    input_backwards: int  # of them followed by an input gradient only
    full_backwards: int  # followed by gradients of inputs and weights
    double_backwards: int = 0  # of the input gradients, differentiated again
    teacher_parameters: int = 0
    teacher_forward_flop: int = 0
    teacher_backwards: int = 0  # full ones

    @property
    def iteration_flop(self) -> int:
        """Operations an image in one training iteration."""
        backwards = self.input_backwards + 2 * self.full_backwards + 2 * self.double_backwards
        teacher = self.teacher_forward_flop * (1 + 2 * self.teacher_backwards)
        return self.forward_flop * (self.forwards + backwards) + teacher


def iteration_cost(config: TrainConfig, image_shape: tuple[int, int, int], num_classes: int) -> Cost:
    """Count the cost of the configured iteration on the fast path, for images of (H, W, C), without
    allocating the network.

    Of the last epoch: a warm-up may forward less. The exact savings are in: a KL attack computes the clean
    probabilities once an iteration, TRADES forwards the clean images again only where asked to, and without a
    backward.
    """
    height, width, channels = image_shape
    attack = resolved_attack(config.attack, config.method)
    with torch.device("meta"):
        network, method = build_fast(config, channels, num_classes)
        method.on_epoch_start(config.epochs, 1.0)
        image = torch.empty(1, channels, height, width)

        def forward_flop(model: str) -> int:  # of the reference's network: on "meta" ours lose their layout
            plain = plain_network(model, num_classes, channels, False).eval()
            with FlopCounterMode(display=False) as counter:
                plain(image)
            return counter.get_total_flops()

        forward, of_teacher = forward_flop(config.model), 0
        if config.method in ("lbgat", "arrest"):
            of_teacher = forward_flop(config.lbgat.teacher if config.method == "lbgat" else config.model)
    base = method.base if isinstance(method, methods.EMR) else method
    teacher = base.teacher if isinstance(base, methods.LBGAT | methods.ARREST) else None
    regularised = int(base is not method)
    steps = attack.steps if method.attacks else 0
    clean_probabilities = int(method.attacks and attack.loss == "kl")
    passes = len(method.plan)
    teacher_parameters = 0 if teacher is None else _count(teacher)
    return Cost(
        parameters=_count(network),
        predictor_parameters=_count(method) - teacher_parameters,
        forward_flop=forward,
        forwards=steps + clean_probabilities + passes + int(method.repeats_clean) + regularised,
        input_backwards=steps + regularised,
        full_backwards=passes,
        double_backwards=regularised,
        teacher_parameters=teacher_parameters,
        teacher_forward_flop=of_teacher,
        teacher_backwards=int(isinstance(base, methods.LBGAT)),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
