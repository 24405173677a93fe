"""Small networks twice, the reference's and ours with equal weights, and an iteration on given images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import AttackConfig
from arat_fast.methods import Method
from arat_fast.models.cifar import ResNet
from arat_fast.nn import bind_branches
from arat_fast.training.step import TrainStep


def pair(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[reference.ResNet, ResNet]:
    """One BatchNorm; running statistics that differ from 0 and 1."""
    torch.manual_seed(seed)
    plain = reference.ResNet((8, 16), (1, 1), num_classes=10, split_bn=False).to(dtype)
    plain.train()(images(dtype)[0])
    ours = ResNet((8, 16), (1, 1), num_classes=10, branches=("adv",))
    bind_branches(ours)
    ours.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, x_adv, labels."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.rand(2, 6, 3, 12, 12, generator=generator, dtype=torch.float64)
    x_adv = (x + 0.06 * (noise - 0.5)).clamp(0, 1)
    return x.to(dtype), x_adv.to(dtype), torch.arange(6)


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def step_of(model: nn.Module, method: Method, **options: Any) -> TrainStep:
    defaults: dict[str, Any] = {"attack": AttackConfig(steps=2), "precision": "fp32", "compiled": False}
    return TrainStep(model, method, sgd(model, method), **(defaults | options))


def assert_same(plain: nn.Module, ours: nn.Module, tolerance: float = 1e-9) -> None:
    """Parameters, statistics and counts."""
    state = plain.state_dict()
    for name, value in ours.state_dict().items():
        expected = state[name].reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=name)
