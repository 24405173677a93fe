"""Feature distances and BatchNorm divergences against torch's own and hand-made networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from arat_fast import reference
from arat_fast.analysis.mixture import (
    EPS,
    InputStatistics,
    batch_norms,
    divergence,
    epoch_variance,
    gaussian_divergence,
    measure_mixture,
    running_statistics,
)


def network(split: bool) -> reference.ResNet:
    torch.manual_seed(0)
    made = reference.resnet8(10, 1, split).double()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return made.eval()


def images(count: int = 6, seed: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(6)


def test_divergence_is_the_mean_of_both_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    m_p, m_q = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    v_p, v_q = torch.rand(2, 7, generator=generator, dtype=torch.float64) + 0.1
    p, q = Normal(m_p, (v_p + EPS).sqrt()), Normal(m_q, (v_q + EPS).sqrt())
    expected = (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    torch.testing.assert_close(gaussian_divergence(m_p, v_p, m_q, v_q), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gaussian_divergence(m_q, v_q, m_p, v_p), expected, rtol=1e-12, atol=1e-14)
    assert gaussian_divergence(m_p, v_p, m_p, v_p).abs().max() == 0
    summary = divergence({"layer": (m_p, v_p)}, {"layer": (m_q, v_q)})["layer"]
    assert summary["mean"] == pytest.approx(float(expected.mean()))
    assert summary["median"] == pytest.approx(float(expected.median()))


@pytest.mark.parametrize("split", [True, False])
def test_every_batch_norm_counts_once(split: bool) -> None:
    norms = batch_norms(network(split))
    assert list(norms) == [
        "bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2", "layer2.0.shortcut_bn",
        "layer3.0.bn1", "layer3.0.bn2", "layer3.0.shortcut_bn",
    ]  # fmt: skip


def test_input_statistics_over_batches_are_those_of_all_images() -> None:
    net, x = network(True), images() + 100  # a large mean, where fp32 sums of squares fail
    statistics, seen = InputStatistics(), {}
    net.bn1.register_forward_pre_hook(lambda _m, inputs: seen.setdefault("x", inputs[0]))
    net(x)
    with statistics.watch(net):
        net(x[:4])
        net(x[4:])
    net(images(seed=9))  # outside the block
    mean, var = statistics.result()["bn1"]
    torch.testing.assert_close(mean, seen["x"].mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(var, seen["x"].var((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_distances_of_one_layer_by_hand() -> None:
    net, x = network(True), images()
    x_adv = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        reference.use_branch(net, "adv")
        z, z_adv = (net.bn1(net.conv1(part)).relu().mean((2, 3)) for part in (x, x_adv))
    reference.use_branch(net, "clean")
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = measure_mixture(net, [(x[:4], x_adv[:4], LABELS[:4]), (x[4:], x_adv[4:], LABELS[4:])])
    assert result["n"] == 6
    expected = (z_adv - z).norm(dim=1)
    assert result["layers"]["bn1"]["distance"] == pytest.approx(float(expected.mean()), rel=1e-12)
    relative = float((expected / z.norm(dim=1)).mean())
    assert result["layers"]["bn1"]["relative"] == pytest.approx(relative, rel=1e-12)
    assert net.training
    assert net.bn1.branch == "clean"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("split", [True, False])
def test_unattacked_images_have_no_distance(split: bool) -> None:
    x = images()
    result = measure_mixture(network(split), [(x, x, LABELS)])
    for layer in result["layers"].values():
        assert layer["distance"] == layer["relative"] == 0
        assert layer["divergence"]["through_adv"]["mean"] == 0
    deepest = result["layers"]["layer3.0.bn2"]["divergence"]
    if split:  # the branches normalise differently, so what lies behind them differs
        assert deepest["measured"]["mean"] > 0.01
        assert deepest["running"]["mean"] > 0.1
        assert result["layers"]["bn1"]["divergence"]["measured"]["mean"] == 0  # nothing split before it
    else:
        assert deepest["measured"] == deepest["through_adv"]
        assert deepest["running"] is None


def test_running_divergence_is_that_of_the_branches() -> None:
    net = network(True)
    for norm in batch_norms(net).values():
        norm.clean.load_state_dict(norm.adv.state_dict())
    assert running_statistics(net, "clean").keys() == batch_norms(net).keys()
    norm = net.layer2[0].bn1
    with torch.no_grad():
        norm.clean.running_mean.add_(2.0)
    result = measure_mixture(net, [(images(), images(), LABELS)])
    variance = norm.adv.running_var + EPS
    assert result["layers"]["layer2.0.bn1"]["divergence"]["running"]["mean"] == pytest.approx(
        float((2.0**2 / variance / 2).mean()), rel=1e-9
    )
    assert result["layers"]["layer3.0.bn1"]["divergence"]["running"]["mean"] == 0


def test_variance_over_epochs() -> None:
    snapshots = [{"clean": {"bn1": [1.0, 5.0]}, "adv": {"bn1": [v, 0.0]}} for v in (1.0, 2.0, 6.0)]
    assert epoch_variance(snapshots) == {"clean": {"bn1": 0.0}, "adv": {"bn1": pytest.approx(3.5)}}
    assert epoch_variance(snapshots[:1]) == {}


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        measure_mixture(nn.Identity(), [])
