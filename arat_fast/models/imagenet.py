"""Residual networks for photos: torchvision's ResNet-18 and ResNet-50 for the fast path.

7x7 stem of stride 2, max-pool, four groups, bottlenecks with the stride on the 3x3 (He et al. 2016, as
torchvision). BN, add and ReLU are one fused call, both branches go in one batch. state_dict names are
torchvision's, so that its weights load into every branch. Taps as in `arat_fast.models.cifar`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.models.cifar import Taps, pooled
from arat_fast.nn import SplitBatchNorm2d

GROUPS = ("layer1", "layer2", "layer3", "layer4")
EXPANSION = 4  # of a bottleneck's output over its inner width


class Block(nn.Module):
    """Post-activation residual block of two 3x3 (basic) or 1x1 - 3x3 - 1x1 (bottleneck) convolutions."""

    def __init__(
        self, in_channels: int, width: int, stride: int, bottleneck: bool, branches: Sequence[str]
    ) -> None:
        super().__init__()
        # kernel, out, stride
        plan = [(3, width, stride), (3, width, 1)]
        if bottleneck:
            plan = [(1, width, 1), (3, width, stride), (1, EXPANSION * width, 1)]
        self.depth = len(plan)
        channels = in_channels
        for k, (kernel, out, step) in enumerate(plan, start=1):
            self.add_module(f"conv{k}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{k}", SplitBatchNorm2d(out, branches))
            channels = out
        self.out_channels = channels
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, SplitBatchNorm2d(channels, branches))

    def forward(self, x: Tensor, name: str = "", taps: Taps | None = None) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride); fill the taps."""
        residual = x if self.downsample is None else self.downsample(x)
        for k in range(1, self.depth):
            x = self.get_submodule(f"bn{k}")(self.get_submodule(f"conv{k}")(x), relu=True)
            if taps is not None and f"{name}.bn{k}" in taps:
                taps[f"{name}.bn{k}"] = pooled(x)
        last = f"bn{self.depth}"
        bn, x = self.get_submodule(last), self.get_submodule(f"conv{self.depth}")(x)
        if taps is not None and f"{name}.{last}" in taps:
            # The tap lies between BN and add, so these two are not fused.
            normalised = bn(x)
            taps[f"{name}.{last}"] = pooled(F.relu(normalised))
            return F.relu(normalised + residual)
        out: Tensor = bn(x, residual=residual, relu=True)
        return out


class PhotoResNet(nn.Module):
    """A residual network with the ImageNet stem; blocks: how many in each of the four groups."""

    def __init__(
        self,
        blocks: Sequence[int],
        bottleneck: bool,
        *,
        num_classes: int,
        in_channels: int = 3,
        branches: Sequence[str] = ("clean", "adv"),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = SplitBatchNorm2d(64, branches)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for g, (name, count) in enumerate(zip(GROUPS, blocks, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                block = Block(channels, 64 * 2**g, 2 if g > 0 and b == 0 else 1, bottleneck, branches)
                group.append(block)
                channels = block.out_channels
            self.add_module(name, group)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.invariance_layers = invariance_layers(self)

    def forward(self, x: Tensor, taps: Taps | None = None) -> Tensor:
        """Logits (N, num_classes) of channels-last images (N, in_channels, H, W) in [0, 1].

        taps: its keys name BatchNorm layers, its values become their pooled features (N, C); "" is the
        classifier's input.
        """
        x = self.bn1(self.conv1(x), relu=True)
        if taps is not None and "bn1" in taps:
            taps["bn1"] = pooled(x)
        x = self.maxpool(x)
        for name in GROUPS:
            for b, block in enumerate(self.get_submodule(name).children()):
                x = block(x, f"{name}.{b}", taps)
        features = pooled(x)
        if taps is not None and "" in taps:
            taps[""] = features
        logits: Tensor = self.fc(features.to(self.fc.weight.dtype))
        return logits


def invariance_layers(model: nn.Module) -> tuple[str, ...]:
    """The taps of the ARAT loss: BatchNorms of `layer4`, shortcuts excepted; none without such a group.

    For torchvision's and timm's residual networks, plain or converted: what has `num_features` is one.
    """
    norms = [name for name, module in model.named_modules() if hasattr(module, "num_features")]
    names = [name.split(".") for name in norms]
    return tuple(".".join(n) for n in names if len(n) == 3 and n[0] == "layer4" and n[2].startswith("bn"))
