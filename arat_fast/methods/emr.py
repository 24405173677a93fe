"""EMR, effective margin regularisation (Liu and Chan, BMVC 2022), around another method.

    z = f(x') with running statistics;  p = softmax(z / T), detached
    L = L of the other method + coefficient * mean over i of ‖J_iᵀ p_i‖²          J_i = ∂z_i / ∂x'_i

The authors sum (∂s/∂x')² over pixels and images, s = mean_i p_i·z_i: with N images lambda / N² times the sum
of ‖J_iᵀ p_i‖². So the coefficient an image is lambda / N, N = 128 theirs, and the batch size changes nothing.
It falls with the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_fast.config import EMRConfig
from arat_fast.methods.base import Method, Outputs
from arat_fast.methods.divergence import wide

# Keeps fp16's small gradients from vanishing; a power of two changes nothing else.
_SCALE = 1024.0


def squared_input_gradient(network: Callable[[Tensor], Tensor], x: Tensor, temperature: float) -> Tensor:
    """‖Jᵀ p‖² of each image (N,) in fp32, differentiable in the network's weights.

    x: images (N, C, H, W) that require grad, or depend on a tensor that does; network: to logits (N,
    classes), each of its image alone.
    """
    with torch.enable_grad():
        logits = wide(network(x))
        p = F.softmax(logits / temperature, 1).detach()
        (gradient,) = torch.autograd.grad((p * logits).sum() * _SCALE, x, create_graph=True)
    return (wide(gradient) / _SCALE).square().sum((1, 2, 3))


class EMR(Method):
    """`base` with one more term; everything else is the base's."""

    coefficient: Tensor

    def __init__(self, base: Method, coefficient: float, temperature: float) -> None:
        super().__init__()
        if "adv" not in base.plan:
            raise ValueError(f"base is {base.name}, which has no adversarial images for the regulariser")
        self.base = base
        self.config = EMRConfig(coefficient, temperature)
        self.name, self.branches, self.taps = base.name, base.branches, base.taps
        self.attacks, self.repeats_clean = base.attacks, base.repeats_clean
        self.register_buffer("coefficient", torch.tensor(coefficient), persistent=False)
        self._zero = torch.zeros((), requires_grad=True)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # What makes the images require grad: a leaf, but no parameter, on the method's device.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._zero = torch.zeros_like(self.coefficient).requires_grad_()
        return self

    @property
    def plan(self) -> tuple[str, ...]:  # type: ignore[override]
        """The base's of this epoch."""
        return self.base.plan

    @property
    def compute(self) -> torch.dtype:  # type: ignore[override]
        """The base's."""
        return self.base.compute

    @compute.setter
    def compute(self, dtype: torch.dtype) -> None:
        self.base.compute = dtype

    def on_epoch_start(self, epoch: int, rate_factor: float) -> None:
        """Lower the coefficient with the learning rate."""
        self.base.on_epoch_start(epoch, rate_factor)
        self.coefficient.fill_(self.config.coefficient * rate_factor)

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """The base's terms and emr."""
        assert outputs.network is not None
        assert outputs.x_adv is not None
        x = outputs.x_adv.detach() + self._zero.to(outputs.x_adv.dtype)
        squares = squared_input_gradient(outputs.network, x, self.config.temperature)
        return self.base.loss(outputs, labels) | {"emr": self.coefficient * squares.mean()}
