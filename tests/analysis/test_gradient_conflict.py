"""Gradient conflict against gradients worked out by hand, and what measuring leaves alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from arat_fast import reference
from arat_fast.analysis.gradient_conflict import (
    Conflict,
    check_invariance,
    gradient_conflict,
    in_form,
    measure_conflict,
    reference_method,
    summarise,
)
from arat_fast.analysis.labels import form_of
from arat_fast.config import TrainConfig
from arat_fast.errors import UserError


class TwoLayers(nn.Module):
    """y = b (a1 x1 + a2 x2): gradients that fit on one line."""

    def __init__(self, a: tuple[float, float], b: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=True).double(), nn.Linear(1, 1, bias=False).double()
        self.first.weight.data = torch.tensor([a], dtype=torch.float64)
        self.first.bias.data.zero_()
        self.second.weight.data = torch.tensor([[b]], dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def small_batch(classes: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    x_adv = (images + 0.1 * torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return images, x_adv, torch.arange(8) % classes


def small_method(**changes: object) -> reference.ARAT:
    torch.manual_seed(0)
    network = reference.resnet8(10, 1, True)
    return reference.ARAT(network, gamma=3.0, **changes).double()  # type: ignore[arg-type]


def test_cosine_and_share_by_hand() -> None:
    # cls = y at (1, 2): d/da = b (1, 2) = (3, 6), d/db = a . x = 1*1 - 1*2 = -1
    # inv = y at (1, -4): d/da = b (1, -4) = (3, -12), d/db = 1 + 4 = 5
    network = TwoLayers((1.0, -1.0), 3.0)
    cls = network(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).sum()
    inv = network(torch.tensor([[1.0, -4.0]], dtype=torch.float64)).sum()
    result = gradient_conflict({"ce_adv": cls / 4, "ce_clean": 3 * cls / 4, "invariance": inv}, network)
    dot, norms = 9 - 72 - 5, math.sqrt((9 + 36 + 1) * (9 + 144 + 25))
    assert result.overall.cosine == pytest.approx(dot / norms, rel=1e-12)
    assert result.overall.share == pytest.approx(2 / 3)
    assert result.overall.coordinates == 3  # the bias is not a weight
    assert result.layers["first"].share == 0.5
    assert result.layers["first"].cosine == pytest.approx((9 - 72) / math.sqrt(45 * 153), rel=1e-12)
    assert result.layers["second"] == Conflict(pytest.approx(-1.0), 1.0, 1)


def test_what_a_term_does_not_reach_is_counted_and_never_in_conflict() -> None:
    network = TwoLayers((1.0, -1.0), 3.0)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    terms = {"ce_clean": network(x).sum(), "invariance": -network.first(x).sum()}
    result = gradient_conflict(terms, network)
    assert result.layers["second"] == Conflict(None, 0.0, 1)
    assert result.overall.share == pytest.approx(2 / 3)
    assert result.overall.cosine is not None


def test_products_too_small_for_fp32_still_conflict() -> None:
    network = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1e-25, -1e-25]])
    result = gradient_conflict({"ce": network(x).sum(), "invariance": -network(x).sum()}, network)
    assert result.overall.share == 1
    assert result.overall.cosine == pytest.approx(-1)


@pytest.mark.parametrize("terms", [{"ce_adv"}, {"invariance"}, set()])
def test_a_missing_term_is_named(terms: set[str]) -> None:
    network = nn.Linear(1, 1)
    value = network(torch.ones(1, 1)).sum()
    with pytest.raises(ValueError, match="expected ce… ones and invariance"):
        gradient_conflict(dict.fromkeys(terms, value), network)


def test_measuring_changes_nothing() -> None:
    method = small_method()
    method.eval()
    reference.use_branch(method.network, "clean")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    modes = [module.training for module in method.modules()]
    measure_conflict(method, *small_batch(), ("trained", "naive", "stop-gradient"))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert [module.training for module in method.modules()] == modes
    branches = {m.branch for m in method.modules() if isinstance(m, reference.SplitBatchNorm2d)}
    assert branches == {"clean"}
    assert all(parameter.grad is None for parameter in method.parameters())


def test_against_gradients_of_each_term_alone() -> None:
    method = small_method()
    images, x_adv, labels = small_batch()
    measured = measure_conflict(method, images, x_adv, labels)["trained"]
    weights = [m.weight for m in method.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    method.train()
    flat = []
    for names in (("ce_adv", "ce_clean"), ("invariance",)):
        terms, _ = method.loss(images, x_adv, labels)
        method.zero_grad(set_to_none=False)
        torch.stack([terms[name] for name in names]).sum().backward()
        flat.append(
            torch.cat(
                [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights]
            )
        )
    cls, inv = flat
    assert measured.overall.cosine == pytest.approx(
        float(nn.functional.cosine_similarity(cls, inv, dim=0)), rel=1e-9
    )
    assert measured.overall.share == pytest.approx(float((cls * inv < 0).double().mean()), abs=1e-12)
    assert sum(layer.coordinates for layer in measured.layers.values()) == sum(w.numel() for w in weights)


def test_forms_share_the_weights_and_differ_in_the_loss() -> None:
    method = small_method()
    batch = small_batch()
    naive, stopped = in_form(method, "naive"), in_form(method, "stop-gradient")
    assert naive.network is stopped.network is method.network
    assert stopped.predictors is method.predictors
    assert all(isinstance(h, nn.Identity) for h in naive.predictors)
    assert naive.a is method.a
    measured = measure_conflict(method, *batch, ("trained", "naive", "stop-gradient"))
    assert measured["stop-gradient"].overall == measured["trained"].overall
    direct = measure_conflict(small_method(invariance="symmetric", use_predictor=False), *batch)["trained"]
    assert measured["naive"].overall == direct.overall
    assert measured["naive"].overall != measured["trained"].overall
    with pytest.raises(ValueError, match="expected one of"):
        in_form(method, "simple")


def test_methods_without_an_invariance_term_say_so(tiny_config: TrainConfig) -> None:
    network = reference.resnet8(10, 1, False)
    for method in ("at", "trades", "standard"):
        with pytest.raises(UserError, match=f"method {method} has no invariance term"):
            reference_method(dataclasses.replace(tiny_config, method=method), network)  # type: ignore[arg-type]
    without = dataclasses.replace(tiny_config, arat=dataclasses.replace(tiny_config.arat, invariance="none"))
    with pytest.raises(UserError, match="invariance none"):
        check_invariance(without)
    kl = dataclasses.replace(tiny_config, attack=dataclasses.replace(tiny_config.attack, loss="kl"))
    with pytest.raises(UserError, match="kl"):
        check_invariance(kl)
    with pytest.raises(UserError, match="of another method"):
        reference_method(tiny_config, reference.resnet8(10, 1, True), {})


def test_which_form_a_run_trained(tiny_config: TrainConfig) -> None:
    def form(invariance: str, predictor: bool) -> str | None:
        arat = dataclasses.replace(tiny_config.arat, invariance=invariance, predictor=predictor)  # type: ignore[arg-type]
        return form_of(dataclasses.replace(tiny_config, arat=arat))

    assert form("stopgrad", True) == form("stopgrad", False) == "stop-gradient"
    assert form("symmetric", False) == "naive"
    assert form("symmetric", True) is form("two-sided", False) is None


def test_means_and_spread_over_batches() -> None:
    method = small_method()
    images, x_adv, labels = small_batch()
    measured = [measure_conflict(method, images * f, x_adv, labels)["trained"] for f in (1.0, 0.9)]
    summary = summarise(measured)
    shares = [m.overall.share for m in measured]
    assert summary["overall"]["share"] == pytest.approx(sum(shares) / 2)
    assert summary["overall"]["share_std"] == pytest.approx(abs(shares[0] - shares[1]) / math.sqrt(2))
    assert summary["layers"]["linear"]["cosine"] is None
    assert summarise(measured[:1])["overall"]["share_std"] is None
