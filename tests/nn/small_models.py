"""A residual network of a few thousand parameters, plain and fused, for the tests of arat_fast.nn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d


class Block(nn.Module):
    """conv - BN - ReLU - conv - BN, add, ReLU; hands residual and ReLU to the BN where that is split."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2: nn.Module = nn.BatchNorm2d(channels, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.bn1, SplitBatchNorm2d):
            out = self.conv2(self.bn1(self.conv1(x), relu=True))
            return self.bn2(out, residual=x, relu=True)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


def small_model(seed: int = 0) -> nn.Sequential:
    """Its BNs have weights and statistics other than the initial ones."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, 1, 1), Block(8), Block(8)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model
