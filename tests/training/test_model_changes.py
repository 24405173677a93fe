"""What is set on a model between iterations is followed or refused, and what failed leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from test_own_model import loader, step_of
from torch import Tensor, nn

from arat_fast.config import AttackConfig
from arat_fast.nn import convert_split_bn
from arat_fast.training.step import TrainStep


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modes_and_frozen_weights_are_those_of_now(precision: str) -> None:
    """Not of when TrainStep was made: in bf16 a copy of the network trains."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)]
    model = convert_split_bn(nn.Sequential(*layers, nn.Linear(8, 4)), ("adv",)).eval()
    step = step_of(model, precision)
    x, y = next(iter(loader(shuffle=False)))
    step(x, y)
    modes: list[bool] = []
    step.twin.module.get_submodule("4").register_forward_hook(lambda layer, *_: modes.append(layer.training))
    for parameter in (model[0].weight, model[5].bias):
        parameter.requires_grad_(False)
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(x, y)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert modes[-1]
    assert moved - {"0.bias"} == {"1.weight", "1.bias", "5.weight"}  # BatchNorm takes 0.bias away
    model[0].weight.requires_grad_(True)
    step(x, y)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_frozen_batch_norm_is_refused_before_anything_changes() -> None:
    model = convert_split_bn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()), ("adv",))
    model.append(nn.Linear(288, 4))
    step = step_of(model.train(), "fp32")
    x, y = next(iter(loader(shuffle=False)))
    step(x, y)
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"BatchNorm 1 is in eval mode .* Call model.train\(\)"):
        step(x, y)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_iteration_that_failed_leaves_no_gradient(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that runs out of memory in its backward does, and is tried again."""

    def build() -> TrainStep:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
        return step_of(convert_split_bn(nn.Sequential(*layers), ("adv",)), precision)

    x, y = next(iter(loader(shuffle=False)))
    failed, plain = build(), build()
    with monkeypatch.context() as patch:
        patch.setattr(failed.twin, "gather_gradients", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failed(x, y)
    failed.step.zero_()
    for one, other in zip(failed.model.buffers(), plain.model.buffers(), strict=True):
        one.copy_(other)
    failed(x, y)
    plain(x, y)
    for one, other in zip(failed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


class Scaled(nn.Module):
    """A temperature and a dropout rate that a training script sets on its way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.0)
        self.fc, self.scale = nn.Linear(288, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1)
        logits: Tensor = self.scale * self.fc(x)
        return logits


def change_scale(model: Scaled) -> None:
    model.scale = 20.0


def change_dropout(model: Scaled) -> None:
    model.drop.p = 1.0


def change_data(model: Scaled) -> None:
    model.fc.weight.data = -5 * model.fc.weight.data


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("change", [change_scale, change_dropout, change_data])
def test_what_is_set_between_calls_is_obeyed(
    change: Callable[[Scaled], None], bn: Literal["batch", "running"], precision: str
) -> None:
    """By the attack and the training pass, whatever copies of the network they compute with."""
    x, y = next(iter(loader(shuffle=False)))
    model = convert_split_bn(Scaled(), ("adv",))
    attack = AttackConfig(steps=2, bn=bn, start="none")
    step = step_of(model.train(), precision, attack=attack)
    step(x, y)
    with torch.no_grad():
        change(model)
    fresh = step_of(copy.deepcopy(model), precision, attack=attack)
    found, expected = step(x, y), fresh(x, y)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_moved_weights_are_guarded_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = next(iter(loader(shuffle=False)))
    model = convert_split_bn(Scaled(), ("adv",))
    step = step_of(model.train(), "fp32", guard=True)
    step(x, y)
    change_data(model)
    step(x, y)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        original = step.method.loss
        patch.setattr(
            step.method, "loss", lambda *given: {k: v * torch.nan for k, v in original(*given).items()}
        )
        step(x, y)
    change_data(model)  # what failed stays known
    step(x, y)
    assert step.guard is not None
    assert step.guard.failure(["ce_adv"]) == (2, "ce_adv")
    before["fc.weight"] *= -5
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replaced_layer_is_refused(precision: str) -> None:
    x, y = next(iter(loader(shuffle=False)))
    model = convert_split_bn(Scaled(), ("adv",))
    step = step_of(model.train(), precision)
    step(x, y)
    model.fc = nn.Linear(288, 4)
    with pytest.raises(ValueError, match=r"'fc' of the model was replaced .* make a new one"):
        step(x, y)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("when", ["backward", "accumulated"])
def test_hooks_of_gradients_are_called(when: str, precision: str) -> None:
    """Pruned weights that a hook keeps at zero."""
    x, y = next(iter(loader(shuffle=False)))
    model = convert_split_bn(Scaled(), ("adv",)).train()
    weight, mask = model.conv.weight, torch.rand(8, 3, 3, 3) > 0.5
    with torch.no_grad():
        weight.mul_(mask)
    if when == "backward":
        weight.register_hook(lambda gradient: gradient * mask)
    else:

        def prune(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)

        weight.register_post_accumulate_grad_hook(prune)
    step = step_of(model, precision)
    for _ in range(2):
        step(x, y)
    assert not weight[~mask].any()
    assert weight[mask].all()
