"""Networks that accelerate has never seen: every spelling of the patterns, and forwards to leave alone."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 8


def norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(C)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-0.5, 0.5)
        layer.running_mean.normal_()  # type: ignore[union-attr]
        layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return layer


def conv() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, 1, 1, bias=False)


class Block(nn.Module):
    """Everything that the forwards below use."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), norm(), conv(), norm()
        self.shortcut = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), norm())
        self.side_bn = norm()
        self.norms = nn.ModuleList([norm(), norm()])
        self.relu, self.gap = nn.ReLU(inplace=True), nn.Identity()
        self.gamma = nn.Parameter(torch.full((C, 1, 1), 0.5))
        self.register_buffer("scale", torch.full((1, C, 1, 1), 2.0))
        self.steps = 0
        self.plain = torch.full((1,), 3.0)


class Functional(Block):
    """kuangliu's CIFAR block."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Methods(Block):
    """Tensor methods, residual first, identities between, optional arguments, a BN as the residual."""

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None, shift: float = 0.0) -> Tensor:
        out = self.gap(self.bn1(self.conv1(x))).relu_()
        if taps is not None:
            taps["bn1"] = out
        out = self.gap(self.bn2(self.conv2(out)))
        return torch.relu(self.gap(torch.add(self.side_bn(x), out))) + shift


class PreActivation(Block):
    """BN - ReLU - conv, the addition last and without ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out), inplace=True)) + x


class AddOnly(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn1(self.conv1(x))


class Listed(Block):
    """BNs in a ModuleList; parameters, buffers and a plain tensor read in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.norms:
            x = self.relu(layer(self.conv1(x))) * self.gamma + self.scale * self.plain
        return x


class ReadTwice(Block):
    """The BN's output is read beside the ReLU: nothing may be fused."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return F.relu(out) + out


class ReadBetween(Block):
    """The BN's input is read again before the addition, where it might be changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x)
        out = self.bn1(hidden)
        return F.relu(out + torch.sigmoid(hidden))


class BroadcastResidual(Block):
    """A residual of one pixel, and one in NCHW order."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))
        return F.relu(self.bn2(self.conv2(out)) + x.contiguous())


class TwoModes(Block):
    """Dropout by F.dropout, and another path in train mode: the flag is read at run time."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, 0.5, self.training)
        return out * 3 if self.training else out


class OtherNormsInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x)) if self.training else F.relu(self.bn2(x))


class BranchOnData(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return out if out.mean() > 100 else out * 2


class BranchOnTypes(Block):
    def forward(self, x: Any) -> Tensor:
        x = torch.cat(x, 1) if not isinstance(x, Tensor) else x
        return F.relu(self.bn1(self.conv1(x)))


class Draws(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return out if random.random() < 0.5 else out * 2


class TorchDraws(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return out * 2 if float(torch.rand(1)) < 2 else out


class Counts(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return F.relu(self.bn1(self.conv1(x)))


class Stores(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.relu(self.bn1(self.conv1(x)))
        return self.kept


class WithoutGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = F.relu(self.bn1(self.conv1(x)))
        return out + self.conv2(x)


class MakesTensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * torch.full((1,), 3.0)


class AnyArguments(Block):
    def forward(self, *inputs: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(inputs[0])))


class ChangesBuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.scale.add_(1)
        return F.relu(self.bn1(self.conv1(x))) * self.scale


class Network(nn.Module):
    """mu/sigma buffers as RobustBench's models, a stem, blocks, dropout and a classifier."""

    mu: Tensor
    sigma: Tensor

    def __init__(self, *blocks: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.25))
        self.stem, self.bn, self.relu = nn.Conv2d(3, C, 3, 1, 1), norm(), nn.ReLU()
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(C, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mu) / self.sigma
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.linear(self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


def network(*kinds: type[Block], dropout: float = 0.0) -> Network:
    torch.manual_seed(0)
    return Network(*(kind() for kind in kinds), dropout=dropout)
