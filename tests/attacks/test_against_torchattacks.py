"""Our PGD in place of torchattacks': the same call, iterates and robust accuracy; in bf16 the better ball."""

from __future__ import annotations

import pytest
import torch
from plain import Scaled
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.kernels.random_start import random_start
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401  torchattacks imports it as it is

torchattacks = pytest.importorskip("torchattacks")
EPS = 8 / 255


def classifier(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(8, 3, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)


@pytest.fixture(scope="module")
def trained(digits: tuple[ImageSet, ImageSet]) -> tuple[nn.Module, Tensor, Tensor]:
    """A network for real digits that errs under attack, and 200 test images."""
    train, test = (
        (torch.as_tensor(part.images).permute(0, 3, 1, 2).float() / 255, torch.as_tensor(part.labels).long())
        for part in digits
    )
    model = classifier(train[0].shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for k in range(200):
        index = torch.arange(k * 64, (k + 1) * 64) % len(train[1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][index]), train[1][index]).backward()
        optimizer.step()
    return model.eval(), test[0][:200], test[1][:200]


def same_start(monkeypatch: pytest.MonkeyPatch, x: Tensor, eps: float) -> None:
    """Let torchattacks draw the noise of our first call with seed 0."""
    noise = random_start(x, eps, seed=0, offset=0) - x
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high: tensor.copy_(noise))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_iterates(steps: int, random: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    model = Scaled(classifier()).eval()
    ours = PGD(model, EPS, 2 / 255, steps, random, seed=0)
    x_adv = ours(x, y)
    same_start(monkeypatch, x, EPS)
    theirs = torchattacks.PGD(model, EPS, 2 / 255, steps, random)(x, y)
    torch.testing.assert_close(x_adv, theirs, rtol=0, atol=1.2e-7)  # they project x' - x, we x'


@pytest.mark.parametrize("steps", [1, 3])
def test_first_iterates_in_l2(steps: int) -> None:
    x, y = batch()
    model = classifier().eval()
    theirs = torchattacks.PGDL2(model, 0.5, 0.2, steps, random_start=False)(x, y)
    ours = PGD(model, 0.5, 0.2, steps, False, norm="L2")(x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.05, 0.1])
def test_robust_accuracy(
    eps: float, trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = trained
    settings = {"eps": eps, "alpha": eps / 4, "steps": 10}
    ours = PGD(model, seed=0, **settings)(x, y)  # type: ignore[arg-type]
    same_start(monkeypatch, x, eps)
    theirs = torchattacks.PGD(model, **settings)(x, y)
    with torch.no_grad():
        clean, a, b = (float((model(images).argmax(1) == y).float().mean()) for images in (x, ours, theirs))
    assert clean > 0.9
    assert 0.02 < a < clean - 0.1
    assert a == b


def test_bf16_in_the_ball_where_theirs_leaves_it() -> None:
    x, y = batch()
    model = classifier().eval().to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    theirs = torchattacks.PGD(model, EPS, 2 / 255, 10)(x, y)
    assert float((theirs.float() - x.float()).abs().max()) * 255 > 8.2
    ours = PGD(model, EPS, 2 / 255, 10)(x, y)
    distance = float((ours - x.float()).abs().max()) * 255
    assert 7.99 < distance < 8.0001
