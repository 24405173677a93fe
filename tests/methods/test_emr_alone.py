"""EMR's regulariser against Jacobians image by image; its coefficient, its phases, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from networks import images, pair, step_of
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from arat_fast.config import ARATConfig, MAILConfig
from arat_fast.methods import ARAT, AT, EMR, MAIL, Outputs, Standard
from arat_fast.methods.emr import squared_input_gradient
from arat_fast.nn import bn_mode


def by_jacobians(network: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """‖J_iᵀ p_i‖² of each image from its whole Jacobian."""
    squares = []
    for image in x:
        one = image[None].contiguous(memory_format=torch.channels_last)
        p = (network(one)[0] / temperature).softmax(0).detach()
        j = jacobian(lambda v: network(v)[0], one)
        squares.append((torch.einsum("k,knchw->nchw", p, j) ** 2).sum())
    return torch.stack(squares)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0])
def test_squares_equal_those_of_per_image_jacobians(temperature: float) -> None:
    _, ours = pair()
    bn_mode(ours, "running")
    x, _, _ = images()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    squares = squared_input_gradient(ours, x, temperature)
    torch.testing.assert_close(squares.detach(), by_jacobians(ours, x.detach(), temperature))


def test_gradients_in_the_weights_by_finite_differences() -> None:
    """Class weights p are constants of the gradient, so they are held while weights are nudged."""
    _, ours = pair()
    bn_mode(ours, "running")
    x, _, _ = images()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    p = ours(x).softmax(1).detach()

    def value() -> float:
        (g,) = torch.autograd.grad((p * ours(x)).sum(), x)
        return float(g.square().sum((1, 2, 3)).mean())

    weights = list(ours.parameters())
    gradients = torch.autograd.grad(squared_input_gradient(ours, x, 1.0).mean(), weights, allow_unused=True)
    checked, h = 0, 1e-7  # at 1e-6 a ReLU flips on the way
    for weight, gradient in zip(weights, gradients, strict=True):
        for k in range(0, weight.numel(), max(1, weight.numel() // 3)):
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(k), weight.shape))
            values = []
            for change in (h, -2 * h, h):
                with torch.no_grad():
                    weight[index] += change
                values.append(value())
            slope = (values[0] - values[1]) / (2 * h)
            found = 0.0 if gradient is None else float(gradient[index])
            assert found == pytest.approx(slope, rel=1e-4, abs=1e-6)
            checked += 1
    assert checked > 30
    assert sum(g is not None and float(g.abs().max()) > 0 for g in gradients) > 6


def test_the_coefficient_an_image_is_lambda_over_n() -> None:
    """lambda sum (∂s/∂x')², s the mean over N images, whatever N: twice the images, the same term."""
    _, ours = pair()
    x, x_adv, y = images()
    method = EMR(AT(), 3 / 6, 1.0).double()

    def network(v: Tensor) -> Tensor:
        with bn_mode(ours, "running"):
            return ours(v)

    at = x_adv.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    z = network(at)
    s = (z.softmax(1).detach() * z).sum(1).mean()
    (g,) = torch.autograd.grad(s, at)
    outputs = Outputs(adv=z, images=x, x_adv=at.detach(), network=network)
    assert float(method.loss(outputs, y)["emr"].detach()) == pytest.approx(3 * float((g**2).sum()), rel=1e-12)
    twice = Outputs(adv=z.repeat(2, 1), x_adv=at.detach().repeat(2, 1, 1, 1), network=network)
    assert twice.x_adv is not None
    twice.x_adv = twice.x_adv.contiguous(memory_format=torch.channels_last)
    again = method.loss(twice, y.repeat(2))["emr"]
    assert float(again.detach()) == pytest.approx(3 * float((g**2).sum()), rel=1e-12)


def test_the_coefficient_falls_with_the_learning_rate_in_place() -> None:
    base = MAIL("at", MAILConfig(start_epoch=3))
    method = EMR(base, 0.0234375, 40.0)
    coefficient = method.coefficient
    for epoch, factor in ((1, 1.0), (3, 0.1), (9, 0.01)):
        method.on_epoch_start(epoch, factor)
        assert method.coefficient is coefficient
        assert float(coefficient) == pytest.approx(0.0234375 * factor)
        assert float(base.phase) == (epoch >= 3)
    assert not method.state_dict()


def test_everything_else_is_the_bases() -> None:
    base = ARAT(ARATConfig(), {"layer1.0.bn1": 8})
    method = EMR(base, 0.1, 1.0)
    for name in ("name", "plan", "branches", "taps", "attacks", "repeats_clean"):
        assert getattr(method, name) == getattr(base, name)
    assert {f"base.{name}" for name in base.state_dict()} == set(method.state_dict())
    assert len(list(method.parameters())) == len(list(base.parameters()))
    method.compute = torch.bfloat16
    assert base.compute is method.compute is torch.bfloat16
    with pytest.raises(ValueError, match="base is standard, which has no adversarial images"):
        EMR(Standard(), 0.1, 1.0)


def test_running_statistics_move_once() -> None:
    _, ours = pair()
    x, x_adv, y = images()
    counts = ours.bn1.num_batches_tracked.clone()
    step_of(ours, EMR(AT(), 0.1, 1.0).double())(x, y, x_adv=x_adv)
    assert torch.equal(ours.bn1.num_batches_tracked, counts + 1)


def test_squares_are_in_fp32_where_bf16s_would_be_wrong() -> None:
    """3,072 squares of 1/64: their sum 0.75 needs more than bf16's 8 bits, and fp16 loses small ones."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(2, 3, 32, 32, requires_grad=True)
        squares = squared_input_gradient(
            lambda v, dtype=dtype: (v.to(dtype) / 64).sum((1, 2, 3))[:, None], x, 1.0
        )
        assert squares.dtype == torch.float32
        assert squares.tolist() == pytest.approx([0.75, 0.75], rel=1e-6)
        tiny = squared_input_gradient(
            lambda v, dtype=dtype: (v * 1e-4).to(dtype).sum((1, 2, 3))[:, None], x, 1.0
        )
        assert tiny.tolist() == pytest.approx([3072e-8] * 2, rel=0.01)
