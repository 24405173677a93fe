"""The effective margin against networks whose margin is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from arat_fast.analysis.margin import effective_margin, measure_margin, summarise


class Linear(nn.Module):
    """Logits W x + b of flattened images: the margin is the distance to the nearest hyperplane."""

    def __init__(self, classes: int = 4, pixels: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def images(count: int = 9) -> Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_linear_networks_margin() -> None:
    network, x = Linear(), images()
    labels = torch.arange(9) % 4
    logits = network(x).detach()
    expected = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        j = max((k for k in range(4) if k != y), key=lambda k: float(z[k]))
        expected.append((z[y] - z[j]) / (network.weight[y] - network.weight[j]).detach().norm())
    torch.testing.assert_close(
        effective_margin(network, x, labels), torch.stack(expected), rtol=1e-12, atol=0
    )
    # A step of the margin's length lands on the boundary; only the runner-up of two classes is certain.
    two = Linear(classes=2)
    margin = effective_margin(two, x, labels % 2)
    normal = (two.weight[0] - two.weight[1]).detach()
    sign = torch.where(labels % 2 == 0, 1.0, -1.0).double()
    on_boundary = x.flatten(1) - (margin * sign)[:, None] * normal / normal.norm()
    gap = two(on_boundary.view_as(x)).detach().diff(dim=1)
    assert gap.abs().max() < 1e-12


def test_negative_where_misclassified_and_inputs_left_alone() -> None:
    network, x = Linear(), images()
    prediction = network(x).argmax(1)
    assert (effective_margin(network, x, prediction) > 0).all()
    assert (effective_margin(network, x, (prediction + 1) % 4) < 0).all()
    assert not x.requires_grad
    assert network.weight.grad is None


def test_a_flat_network_has_no_finite_margin() -> None:
    network = Linear()
    with torch.no_grad():
        network.weight.zero_()
    margins = effective_margin(network, images(2), torch.tensor([int(network.bias.argmax()), 0]))
    assert margins[0] == math.inf
    with pytest.raises(ValueError, match="no margin is finite"):
        summarise(margins)


def test_distribution() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, math.inf])
    summary = summarise(values)
    assert (summary["n"], summary["not_finite"]) == (5, 1)
    assert summary["share_not_positive"] == pytest.approx(0.4)
    assert summary["quantiles"]["0.5"] == 1
    assert summary["mean"] == 1
    assert sum(summary["histogram"]["counts"]) == 5
    assert summary["histogram"]["edges"][0] == -1
    assert summary["values"] == [-1, 0, 1, 2, 3]


def test_over_batches() -> None:
    network, x = Linear(), images()
    labels = torch.arange(9) % 4
    network.train()
    summary = measure_margin(network, [(x[:5], labels[:5]), (x[5:], labels[5:])])
    assert summary["values"] == pytest.approx(effective_margin(network, x, labels).tolist(), rel=1e-5)
    assert network.training
    with pytest.raises(ValueError, match="at least one"):
        measure_margin(network, [])
