"""The two floors of an iteration: the arithmetic it must do, and the bytes it must move.

Arithmetic: `arat_fast.training.cost`. Bytes: what a network of library convolutions and fused BatchNorms
moves through memory when every tensor is read and written as seldom as its operation allows. In elements:

    convolution   forward x + y + W; input gradient dy + dx + W; weight gradient x + dy + W (W once a batch)
    BatchNorm     by the batch's statistics, with ReLU: forward 3 y, backward 5 y; a residual adds one to each
                  by running statistics, folded: forward 2 y, backward 2 y; a residual adds one to the forward
    join          a block's input is used twice, so two gradients are added: backward 1 x within the
                  backward of a BatchNorm with a residual, or of a ReLU alone, 2 x within that of a BatchNorm
                  without one, 3 x anywhere else
    sum           of a residual that no BatchNorm adds: forward 3 x

Fusing BatchNorm into a convolution's epilogue would move less; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import TrainConfig
from arat_fast.training.cost import iteration_cost


@dataclass(frozen=True)
class Traffic:
    """Elements an image of a network's tensors (weights: of the whole network).

    residual: of BatchNorm outputs that take a residual; joins, joins_folded: what adding up the gradients of
    blocks' inputs moves, by the batch's statistics and folded; sums: of residual sums that no BatchNorm does.
    """

    conv_in: int
    conv_out: int
    weights: int
    batch_norm: int
    residual: int
    joins: int
    joins_folded: int
    sums: int

    def forward(self, batch: int, folded: bool) -> float:
        """Elements an image that a forward moves."""
        norm = (2 if folded else 3) * self.batch_norm + self.residual
        return self.conv_in + self.conv_out + self.weights / batch + norm + 3 * self.sums

    def input_backward(self, batch: int, folded: bool) -> float:
        """Elements an image that an input gradient moves."""
        norm = 2 * self.batch_norm if folded else 5 * self.batch_norm + self.residual
        joins = self.joins_folded if folded else self.joins
        return self.conv_in + self.conv_out + self.weights / batch + norm + joins

    def weight_backward(self, batch: int) -> float:
        """Elements an image that weight gradients move beside the input gradients."""
        return self.conv_in + self.conv_out + self.weights / batch


def network_traffic(model: str, side: int) -> Traffic:
    """Counted on the reference network without allocating it; images are (3, side, side)."""
    counts = dict.fromkeys(Traffic.__dataclass_fields__, 0)

    def conv(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counts["conv_in"] += inputs[0].numel()
        counts["conv_out"] += output.numel()
        counts["weights"] += layer.weight.numel()

    def norm(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts["batch_norm"] += output.numel()

    def block(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        basic, size = isinstance(layer, reference.BasicBlock), inputs[0].numel()
        # Of a pre-activated block with a shortcut the two gradients meet behind its first BatchNorm.
        fused = basic or layer.shortcut is not None
        with_residual = basic and counts["residual"] > 0  # the stem's has none
        counts["joins"] += size * (3 if not fused else 1 if with_residual else 2)
        counts["joins_folded"] += size * (1 if fused else 3)
        counts["residual" if basic else "sums"] += output.numel()

    with torch.device("meta"):
        network = reference.MODELS[model](10, 3).eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(conv)
            elif isinstance(layer, reference.SplitBatchNorm2d):
                layer.register_forward_hook(norm)
            elif isinstance(layer, reference.BasicBlock | reference.WideBlock):
                layer.register_forward_hook(block)
        network(torch.empty(1, 3, side, side))
    return Traffic(**counts)


@dataclass(frozen=True)
class Floors:
    """What an image costs at least: FLOP and bytes."""

    flop: float
    bytes: float

    def limits(self, flop_per_second: float, bytes_per_second: float) -> tuple[float, float, float]:
        """Images/s by (arithmetic, bytes, both in turn, as when nothing overlaps)."""
        by_flop, by_bytes = self.flop / flop_per_second, self.bytes / bytes_per_second
        return 1 / by_flop, 1 / by_bytes, 1 / (by_flop + by_bytes)


def _flop(model: str, side: int, steps: int) -> tuple[int, int]:
    """(a forward, an ARAT iteration)"""
    config = TrainConfig(model=model)
    config = replace(config, attack=replace(config.attack, steps=steps))
    cost = iteration_cost(config, (side, side, 3), 10)
    return cost.forward_flop, cost.iteration_flop


def attack_floors(model: str, side: int, steps: int, batch: int, element: int, folded: bool) -> Floors:
    """Of `steps` input gradients; element: bytes an element; folded: by running statistics."""
    traffic = network_traffic(model, side)
    each = traffic.forward(batch, folded) + traffic.input_backward(batch, folded)
    return Floors(2.0 * steps * _flop(model, side, steps)[0], element * steps * each)


def iteration_floors(model: str, side: int, steps: int, batch: int, element: int, folded: bool) -> Floors:
    """Of an ARAT iteration: the attack, then forward and backward of both kinds of images.

    The optimizer's traffic is left out: 5 fp32 tensors of the weights' size a batch, 2 MB an image at 128.
    """
    traffic = network_traffic(model, side)
    trained = traffic.forward(2 * batch, False) + traffic.input_backward(2 * batch, False)
    trained += traffic.weight_backward(2 * batch)
    attack = attack_floors(model, side, steps, batch, element, folded)
    return Floors(float(_flop(model, side, steps)[1]), attack.bytes + 2 * element * trained)
