"""CIFAR residual networks for the fast path: BN, add and ReLU in one fused call, both branches in one batch.

The same architectures as `arat_fast.reference`, whose weights they take over through `arat_fast.nn`'s
converters. `forward` returns logits and fills the taps that are asked for: the features of the ARAT loss, the
average- pooled ReLU of the tapped BatchNorms' outputs before the residual add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d

Taps = dict[str, Tensor]


def pooled(x: Tensor) -> Tensor:
    """Average over the pixels of (N, C, H, W), in fp32: (N, C)."""
    return x.float().mean((2, 3)) if x.dtype != torch.float64 else x.mean((2, 3))


class BasicBlock(nn.Module):
    """Post-activation residual block: 3x3 - BN - ReLU - 3x3 - BN, add, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, branches: Sequence[str]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = SplitBatchNorm2d(channels, branches)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = SplitBatchNorm2d(channels, branches)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_bn = SplitBatchNorm2d(channels, branches)

    def forward(self, x: Tensor, name: str = "", taps: Taps | None = None) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride); fill the taps asked for."""
        residual = x if self.shortcut is None else self.shortcut_bn(self.shortcut(x))
        hidden = self.bn1(self.conv1(x), relu=True)
        if taps is not None and f"{name}.bn1" in taps:
            taps[f"{name}.bn1"] = pooled(hidden)
        if taps is not None and f"{name}.bn2" in taps:
            # The tap lies between BN and add, so these two layers are not fused.
            normalised = self.bn2(self.conv2(hidden))
            taps[f"{name}.bn2"] = pooled(F.relu(normalised))
            return F.relu(normalised + residual)
        out: Tensor = self.bn2(self.conv2(hidden), residual=residual, relu=True)
        return out


class ResNet(nn.Module):
    """CIFAR residual network: 3x3 stem, no max-pool, groups of basic blocks, each group after the first
    `full_size` ones of stride 2.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        branches: Sequence[str] = ("clean", "adv"),
        full_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = SplitBatchNorm2d(widths[0], branches)
        channels = widths[0]
        self.group_names = [f"layer{g + 1}" for g in range(len(widths))]
        for g, (name, width, count) in enumerate(zip(self.group_names, widths, blocks, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                stride = 2 if g >= full_size and b == 0 else 1
                group.append(BasicBlock(channels, width, stride, branches))
                channels = width
            self.add_module(name, group)
        self.linear = nn.Linear(channels, num_classes)
        last = self.group_names[-1]
        self.invariance_layers = tuple(f"{last}.{b}.{bn}" for b in range(blocks[-1]) for bn in ("bn1", "bn2"))

    def forward(self, x: Tensor, taps: Taps | None = None) -> Tensor:
        """Logits (N, num_classes) of channels-last images (N, in_channels, H, W) in [0, 1].

        taps: its keys name BatchNorm layers, its values become their pooled features (N, C); "" is the
        classifier's input.
        """
        x = self.bn1(self.conv1(x), relu=True)
        if taps is not None and "bn1" in taps:
            taps["bn1"] = pooled(x)
        for name in self.group_names:
            for b, block in enumerate(self.get_submodule(name).children()):
                x = block(x, f"{name}.{b}", taps)
        features = pooled(x)
        if taps is not None and "" in taps:
            taps[""] = features
        logits: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return logits


class WideBlock(nn.Module):
    """Pre-activation residual block: BN - ReLU - 3x3 - BN - ReLU - 3x3, add."""

    def __init__(self, in_channels: int, channels: int, stride: int, branches: Sequence[str]) -> None:
        super().__init__()
        self.bn1 = SplitBatchNorm2d(in_channels, branches)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = SplitBatchNorm2d(channels, branches)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor, name: str = "", taps: Taps | None = None) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride); fill the taps asked for."""
        first = self.bn1(x, relu=True)
        residual = x if self.shortcut is None else self.shortcut(first)
        second = self.bn2(self.conv1(first), relu=True)
        for key, value in ((f"{name}.bn1", first), (f"{name}.bn2", second)):
            if taps is not None and key in taps:
                taps[key] = pooled(value)
        out: Tensor = residual + self.conv2(second)
        return out


class WideResNet(nn.Module):
    """Wide residual network of three groups, convolutions initialised N(0, sqrt(2 / (k^2 C_out)))."""

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        branches: Sequence[str] = ("clean", "adv"),
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        channels = 16
        self.group_names = ["block1", "block2", "block3"]
        for g, name in enumerate(self.group_names):
            group = nn.Sequential()
            for b in range(blocks):
                group.append(WideBlock(channels, 16 * 2**g * widen, 2 if g > 0 and b == 0 else 1, branches))
                channels = 16 * 2**g * widen
            self.add_module(name, group)
        self.bn1 = SplitBatchNorm2d(channels, branches)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] ** 2 * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.linear.bias)
        self.invariance_layers = (
            *(f"block3.{b}.{bn}" for b in range(blocks) for bn in ("bn1", "bn2")),
            "bn1",
        )

    def forward(self, x: Tensor, taps: Taps | None = None) -> Tensor:
        """Logits (N, num_classes) of channels-last images (N, in_channels, H, W) in [0, 1].

        taps: its keys name BatchNorm layers, its values become their pooled features (N, C); "" is the
        classifier's input.
        """
        x = self.conv1(x)
        for name in self.group_names:
            for b, block in enumerate(self.get_submodule(name).children()):
                x = block(x, f"{name}.{b}", taps)
        features = pooled(self.bn1(x, relu=True))
        for key in ("bn1", ""):
            if taps is not None and key in taps:
                taps[key] = features
        logits: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return logits
