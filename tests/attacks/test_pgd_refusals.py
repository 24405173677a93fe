"""What PGD refuses, and that the message says what was given and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import batch, convolutional, networks
from torch import Tensor, nn

from arat_fast.attacks import PGD


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps is -0.1; expected a finite number"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"alpha": float("inf")}, ValueError, "alpha is inf"),
        ({"eps": "8/255"}, TypeError, "eps is a str; expected a number"),
        ({"steps": 0}, ValueError, "steps is 0; expected at least 1"),
        ({"steps": 2.0}, TypeError, "steps is a float"),
        ({"norm": "linf"}, ValueError, "unknown norm 'linf': did you mean 'Linf'"),
        ({"norm": 2}, TypeError, "norm is a int; expected one of Linf, L2"),
        ({"loss": "KL"}, ValueError, "unknown loss 'KL'"),
        ({"loss": "margni"}, ValueError, "did you mean 'margin'"),
        ({"start": "normall"}, ValueError, "did you mean 'normal'"),
        ({"bn": "eval"}, ValueError, "unknown bn 'eval'"),
        ({"precision": "bf61"}, ValueError, "did you mean 'bf16'"),
        ({"seed": 1.5}, TypeError, "seed is a float"),
        ({"loss": "kl", "random_start": False}, ValueError, "gradient at the image itself is zero"),
        ({"update_statistics": True}, ValueError, "expected bn='batch'"),
        ({"branch": "adv"}, ValueError, "no split BatchNorm: convert it with convert_split_bn"),
        ({"model": "resnet18"}, TypeError, "model is a str; expected an nn.Module"),
        ({"model": lambda x: x}, TypeError, r"model is a function; .* nn.Sequential\(normalise, model\)"),
        ({"eps": 8, "alpha": 2}, ValueError, "eps is 8; expected at most 1, .* such as 8/255"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**({"model": convolutional()} | settings))


def test_an_unknown_branch() -> None:
    with pytest.raises(ValueError, match="unknown branch 'adversarial'"):
        PGD(networks(torch.float32)[1], branch="adversarial")
    with pytest.raises(ValueError, match="did you mean 'clean'"):
        PGD(networks(torch.float32)[1], branch="claen")


X, Y = batch(torch.float32)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        ((X * 255).to(torch.uint8), Y, TypeError, "images are torch.uint8; expected a float tensor"),
        (X.numpy(), Y, TypeError, "images are ndarray"),
        (X * 2 - 1, Y, ValueError, r"images span \[-0.99.*normalises inside"),
        (X + 1e-3, Y, ValueError, r"images span .* 1.001\]"),
        (X / X.max() + 2e-7, Y, ValueError, r"images span .* 1.00000024\]; .* images.clamp\(0, 1\)"),
        (X.where(X < 0.99, torch.nan), Y, ValueError, "images contain NaN"),
        (X[0, 0, 0], Y, ValueError, r"images have shape \(12,\); expected \(N, C, H, W\)"),
        (X, Y.int(), TypeError, "labels are torch.int32; expected an int64 tensor"),
        (X, [0] * 6, TypeError, "labels are list"),
        (X, Y[:5], ValueError, r"labels have shape \(5,\); expected \(6,\)"),
        (X, torch.eye(6, dtype=torch.int64), ValueError, r"labels have shape \(6, 6\)"),
        (X, Y - 1, ValueError, "labels contain -1"),
        (X, Y + 5, ValueError, "labels reach 10; the model has 10 classes, 0 to 9"),
        (X.to("meta"), Y, ValueError, "images are on meta; expected cpu, where the model is"),
        (X, Y.to("meta"), ValueError, "labels are on meta; expected cpu"),
    ],
)
def test_batches(images: Any, labels: Any, error: type[Exception], message: str) -> None:
    model = convolutional().train()
    with pytest.raises(error, match=message):
        PGD(model)(images, labels)
    assert all(m.training for m in model.modules())


def test_models_that_return_something_else() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="the model returned a tuple; expected logits"):
        PGD(Pair())(X, Y)
    with pytest.raises(ValueError, match=r"the model returned shape \(6, 3, 12, 12\) for 6 images"):
        PGD(nn.Identity())(X, Y)


def test_values_are_not_read_back_where_asked() -> None:
    x_adv = PGD(convolutional(), steps=1, check_values=False)(X + 0.5, Y)
    assert float(x_adv.max()) <= 1


def test_an_l2_ball_may_be_larger_than_the_range_of_a_pixel() -> None:
    assert PGD(convolutional(), eps=3.0, alpha=0.5, steps=1, norm="L2")(X, Y).shape == X.shape


def test_an_empty_batch() -> None:
    assert PGD(convolutional())(X[:0], Y[:0]).shape == (0, 3, 12, 12)
