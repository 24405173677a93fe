"""Small classifiers and a plain PGD for the tests of arat_fast.attacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.models.cifar import ResNet
from arat_fast.nn import bind_branches, from_authors

LABELS = torch.arange(6)


def batch(dtype: torch.dtype = torch.float64, channels_last: bool = True) -> tuple[Tensor, Tensor]:
    """Six 12x12 images in [0, 1] and their labels."""
    x = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x), LABELS


def networks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The reference's split-BN network and ours, equal, with statistics that differ from 0 and 1."""
    torch.manual_seed(0)
    plain = reference.ResNet((8, 16), (1, 1), num_classes=10).to(dtype)
    x, _ = batch(dtype)
    for branch in reference.BRANCHES:
        reference.use_branch(plain, branch)
        plain.train()(x)
    ours = ResNet((8, 16), (1, 1), num_classes=10)
    bind_branches(ours)
    ours.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours.load_state_dict(from_authors(plain.state_dict()))
    return plain, ours


class Scaled(nn.Module):
    """Normalisation as RobustBench's models carry it: `mu` and `sigma` buffers, then the network."""

    mu: Tensor
    sigma: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mu) / self.sigma)


def convolutional(dropout: float = 0.0) -> nn.Module:
    """An unnormalised input, a plain BatchNorm, dropout: 12x12 images to 10 logits."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)]
    network = nn.Sequential(*layers, nn.Conv2d(8, 16, 3, 2, 1), nn.Flatten(), nn.Linear(144, 10))
    model = Scaled(network)
    model.train()(batch(torch.float32)[0])
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
