"""The reference against figures of the ARAT authors' released code, computed in float64 on deterministic
inputs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast import reference

GOLDEN = json.loads((Path(__file__).parent / "data" / "arat_resnet18.json").read_text())
TOLERANCE = 1e-8  # stated with the figures: scalars and norms relative, logits absolute


def wave(k: int, shape: torch.Size, name: str) -> Tensor:
    """The k-th parameter: offset + scale * sin(0.7310 i + 1.3 k + 0.11 (i mod 7)(i mod 11))."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    offset = 0.0
    if len(shape) > 1:
        scale = 1.2 * math.sqrt(3 / math.prod(shape[1:]))
    elif name.endswith("weight"):
        scale, offset = 0.1, 1.0
    else:
        scale = 0.05
    return (offset + scale * torch.sin(0.7310 * i + 1.3 * k + 0.11 * (i % 7) * (i % 11))).reshape(shape)


def golden_images(batch: int = GOLDEN["batch"]) -> tuple[Tensor, Tensor]:
    i = torch.arange(batch * 3 * 32 * 32, dtype=torch.float64)
    x = 0.5 + 0.45 * torch.sin(0.0137 * i + 0.9 * torch.cos(0.0021 * i)) * torch.cos(0.31 * (i % 32))
    return x.reshape(batch, 3, 32, 32), 7 * torch.arange(batch) % 10


def golden_adversarial(x: Tensor) -> Tensor:
    i = torch.arange(x.numel(), dtype=torch.float64)
    noise = (8 / 255) * torch.sin(2.17 * i + 0.05 * (i % 13))
    return (x + noise.reshape(x.shape)).clamp(0, 1)


def authors_names(method: reference.ARAT) -> dict[str, nn.Parameter]:
    """Our parameters under the names of the authors' code."""
    named = {f"model.{name}": p for name, p in method.network.named_parameters()}
    for layer, h in zip(method.layers, method.predictors, strict=True):
        named |= {f"predictor[{layer}].{name}": p for name, p in h.named_parameters()}
    return named


def golden_method(**options: object) -> reference.ARAT:
    method = reference.ARAT(reference.resnet18().double(), gamma=GOLDEN["gamma"], **options).double()  # type: ignore[arg-type]
    method.a.fill_(GOLDEN["balance_a"])
    named = authors_names(method)
    with torch.no_grad():
        for k, name in enumerate(GOLDEN["param_order"]):
            if name in named:
                named[name].copy_(wave(k, named[name].shape, name))
    return method.train()


@pytest.fixture(scope="module")
def computed() -> tuple[reference.ARAT, dict[str, Tensor], dict[str, Tensor]]:
    method = golden_method()
    x, labels = golden_images()
    terms, logits = method.loss(x, golden_adversarial(x), labels)
    torch.stack(list(terms.values())).sum().backward()
    return method, terms, logits


def close(value: float | Tensor, expected: float, scale: float | None = None) -> bool:
    return abs(float(torch.as_tensor(value, dtype=torch.float64).detach()) - expected) <= TOLERANCE * (
        abs(expected) if scale is None else scale
    )


def test_parameters_are_those_of_the_authors(computed) -> None:
    method = computed[0]
    assert sorted(authors_names(method)) == sorted(GOLDEN["param_order"])
    assert sum(p.numel() for p in method.network.parameters()) == GOLDEN["num_params_model"] == 11_183_562
    assert (
        sum(p.numel() for p in method.predictors.parameters()) == GOLDEN["num_params_predictors"] == 527_360
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in reference.wrn_34_10().parameters()) == 46_182_906


def test_losses_and_logits(computed) -> None:
    method, terms, logits = computed
    assert method.layers == tuple(GOLDEN["layers"])
    assert [h[0].in_features for h in method.predictors] == list(GOLDEN["feature_dims"].values())
    a = GOLDEN["balance_a"]
    assert close(terms["ce_adv"] / a, GOLDEN["ce_adv"])
    assert close(terms["ce_clean"] / (1 - a), GOLDEN["ce_clean"])
    assert close(sum(terms.values()), GOLDEN["total"])
    align = sum(GOLDEN["align"].values()) / len(GOLDEN["align"])
    assert close(terms["invariance"] / GOLDEN["gamma"], align)
    for branch in ("clean", "adv"):
        expected = torch.tensor(GOLDEN[f"logits_{branch}"], dtype=torch.float64)
        assert (logits[branch] - expected).abs().max() <= TOLERANCE


def test_alignment_of_each_layer() -> None:
    x, labels = golden_images()
    for layer, expected in GOLDEN["align"].items():
        # One predictor at a time, so that each layer's distance is seen on its own.
        method = golden_method(layers=(layer,))
        terms, _ = method.loss(x, golden_adversarial(x), labels)
        assert close(terms["invariance"] / GOLDEN["gamma"], expected)


def test_gradients(computed) -> None:
    for name, p in authors_names(computed[0]).items():
        l2 = GOLDEN["grad_l2"][name]
        assert close(p.grad.norm(), l2), name
        assert close(p.grad.sum(), GOLDEN["grad_sum"][name], scale=math.sqrt(p.numel()) * l2), name


def test_running_statistics(computed) -> None:
    buffers = dict(computed[0].network.named_buffers())
    assert len(GOLDEN["running"]) == 80
    for name, (l2, total) in GOLDEN["running"].items():
        assert close(buffers[name].norm(), l2), name
        assert close(buffers[name].sum(), total, scale=math.sqrt(buffers[name].numel()) * l2), name


def attack_figures(x: Tensor, x_adv: Tensor) -> dict[str, float | int]:
    delta = x_adv - x
    return {
        "mean": float(x_adv.mean()),
        "delta_l2": float(delta.norm()),
        "delta_linf": float(delta.abs().max()),
        "positive": int((delta > 1e-9).sum()),
        "negative": int((delta < -1e-9).sum()),
        "zero": int((delta.abs() <= 1e-9).sum()),
    }


def assert_figures(figures: dict[str, float | int], golden: dict[str, float]) -> None:
    for name, value in figures.items():
        assert value == golden[name] if isinstance(value, int) else close(value, golden[name]), name


def test_attack_from_a_zero_start_leaves_the_clean_branch_alone() -> None:
    golden = GOLDEN["pgd3_zero_start"]
    network = golden_method().network
    clean_before = {k: v.clone() for k, v in network.named_buffers() if ".clean." in k}
    x, labels = golden_images()
    x_adv = reference.pgd(network, x, labels, eps=8 / 255, alpha=2 / 255, steps=3)
    assert_figures(attack_figures(x, x_adv), golden)
    assert close(network.bn1.adv.running_mean.norm(), golden["running_mean_adv_l2_stem"])
    assert all(torch.equal(v, dict(network.named_buffers())[k]) for k, v in clean_before.items())
    loss = F.cross_entropy(network(x_adv), labels, reduction="sum")
    assert close(loss, golden["loss_sum_after"])


def test_attack_with_projection_and_clamp() -> None:
    golden = GOLDEN["pgd6_clamped"]
    network = golden_method().network
    x, labels = golden_images()
    x = (0.5 + 1.4 * (x - 0.5)).clamp(0, 1)
    assert (int((x == 0).sum()), int((x == 1).sum())) == (golden["x_at_0"], golden["x_at_1"])
    assert close(x.mean(), golden["x_mean"])
    x_adv = reference.pgd(network, x, labels, eps=8 / 255, alpha=3 / 255, steps=6)
    assert_figures(attack_figures(x, x_adv), golden)
    assert int(((x_adv - x).abs() >= 8 / 255 - 1e-9).sum()) == golden["at_eps_ball"]
    assert int((x_adv <= 1e-9).sum()) == golden["adv_at_0"]
    assert int((x_adv >= 1 - 1e-9).sum()) == golden["adv_at_1"]
    assert close(F.cross_entropy(network(x_adv), labels, reduction="sum"), golden["loss_sum_after"])


@pytest.mark.parametrize(
    "wrong", [{"invariance": "symmetric"}, {"use_predictor": False}, {"auto_balance": False}]
)
def test_each_ablation_departs_from_the_figures(wrong: dict[str, object], computed) -> None:
    """The figures discriminate: a wrong loss must miss them, in value or in gradient."""
    method = golden_method(**wrong)
    x, labels = golden_images()
    terms, _ = method.loss(x, golden_adversarial(x), labels)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    gradient = method.network.conv1.weight.grad.norm()
    assert not (close(total, GOLDEN["total"]) and close(gradient, GOLDEN["grad_l2"]["model.conv1.weight"]))
