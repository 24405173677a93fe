"""What an iteration costs: parameters, arithmetic, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from arat_fast.config import TrainConfig
from arat_fast.training.build import build_method, build_network


@dataclass(frozen=True)
class Cost:
    """Arithmetic counts a multiply-add as two operations; an input gradient costs a forward, weights'
    another.
    """

    parameters: int
    predictor_parameters: int
    forward_flop: int  # one image, one forward
    forwards: int  # an iteration
    input_backwards: int  # of them followed by an input gradient only
    full_backwards: int  # followed by gradients of inputs and weights

    @property
    def iteration_flop(self) -> int:
        """Operations an image in one training iteration."""
        return self.forward_flop * (self.forwards + self.input_backwards + 2 * self.full_backwards)


def iteration_cost(config: TrainConfig, image_shape: tuple[int, int, int], num_classes: int) -> Cost:
    """Count the cost of the configured iteration for images of (H, W, C), without allocating the network."""
    height, width, channels = image_shape
    with torch.device("meta"):
        network = build_network(config, channels, num_classes).eval()
        method = build_method(config, network)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, height, width))
    of_network = sum(p.numel() for p in network.parameters())
    attacks = config.attack.steps if config.method == "arat" else 0
    passes = 2 if config.method == "arat" else 1
    return Cost(
        parameters=of_network,
        predictor_parameters=sum(p.numel() for p in method.parameters()) - of_network,
        forward_flop=counter.get_total_flops(),
        forwards=attacks + passes,
        input_backwards=attacks,
        full_backwards=passes,
    )
