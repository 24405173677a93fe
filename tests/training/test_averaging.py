"""SWA on the paper's schedule, EMA, and BatchNorm recalibration against independent computations."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from arat_fast import reference
from arat_fast.config import AttackConfig, TrainConfig
from arat_fast.errors import UserError
from arat_fast.evaluation.network import load_run
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.stream import Batch, counter_seed
from arat_fast.training.averaging import WeightAverage, adversarial_images, recalibrate, swa_due
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.trainer import Trainer


def network(seed: int = 0) -> reference.ResNet:
    torch.manual_seed(seed)
    return reference.ResNet((8, 16), (1, 1), num_classes=10)


def test_nineteen_snapshots_on_the_papers_schedule() -> None:
    due = [(e, b) for e in range(1, 101) for b in range(391) if swa_due(76, 500, e, b, 391)]
    assert len(due) == 19
    assert due[0] == (76, 284)  # step 30,000
    assert not any(swa_due(0, 500, e, b, 391) for e in range(1, 101) for b in range(391))


def test_swa_and_ema_equal_independent_averages() -> None:
    net = network().double()
    swa, ema = WeightAverage(net), WeightAverage(net, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    history: list[list[Tensor]] = [[p.detach().clone() for p in net.parameters()]]
    for _ in range(5):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        swa.update(net)
        ema.update(net)
        history.append([p.detach().clone() for p in net.parameters()])
    for k, name in enumerate(dict(net.named_parameters())):
        values = torch.stack([h[k] for h in history])
        torch.testing.assert_close(swa.values[name], values[1:].mean(0), rtol=1e-12, atol=1e-12)
        weights = torch.tensor([0.9**5, *(0.1 * 0.9 ** (5 - j) for j in range(1, 6))], dtype=torch.float64)
        expected = torch.tensordot(weights, values, dims=1)
        torch.testing.assert_close(ema.values[name], expected, rtol=1e-12, atol=1e-12)


def test_recalibrated_statistics_equal_a_direct_computation() -> None:
    net = network().double()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (6, 6, 3)]
    reference.train_step(reference.ARAT(net).double(), torch.optim.SGD(net.parameters(), 0.1), batches[0],
                         torch.arange(6), steps=1)  # fmt: skip
    clean_before = {n: b.clone() for n, b in net.named_buffers() if ".clean." in n}
    net.eval()
    net.layer1.train()
    modes = [m.training for m in net.modules()]
    net.bn1.adv.running_mean.fill_(torch.nan)  # what was there does not count

    recalibrate(net, batches)

    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(b, dict(net.named_buffers())[n]) for n, b in clean_before.items())
    # The stem, whose input does not depend on other statistics: means and unbiased variances by hand.
    means, variances = [], []
    for images in batches:
        values = net.conv1(images).detach().transpose(0, 1).flatten(1)
        means.append(values.mean(1))
        variances.append(values.var(1, unbiased=True))
    weights = torch.tensor([6 / 15, 6 / 15, 3 / 15], dtype=torch.float64)
    stem = net.bn1.adv
    torch.testing.assert_close(stem.running_mean, torch.tensordot(weights, torch.stack(means), 1))
    torch.testing.assert_close(stem.running_var, torch.tensordot(weights, torch.stack(variances), 1))
    # A deep layer: torch's own cumulative average (momentum None) over equal batches.
    twin = copy.deepcopy(net)
    recalibrate(net, batches[:2])
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    reference.use_branch(twin, "adv")
    twin.train()
    with torch.no_grad():
        for images in batches[:2]:
            twin(images)
    torch.testing.assert_close(net.layer2[0].bn2.adv.running_var, twin.layer2[0].bn2.adv.running_var)
    assert net.layer2[0].bn2.adv.momentum == 0.1


@pytest.mark.parametrize("method", ["arat", "trades"])
@pytest.mark.parametrize("aliased", [False, True])
def test_images_to_recalibrate_by_are_attacked_as_the_run_attacks(method: str, aliased: bool) -> None:
    """Loss and start written out: uniform and cross entropy, or normal and KL; statistics left alone."""
    net = network().double()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()
    y = torch.arange(6)
    attack = AttackConfig(steps=2, aliased_start=aliased)
    config = TrainConfig(method=method, attack=attack)  # type: ignore[arg-type]
    before = {n: b.clone() for n, b in net.named_buffers()}
    (found,) = adversarial_images(config, net, [Batch(x, y, torch.arange(6))], 4)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())

    generator = torch.Generator().manual_seed(counter_seed(config.seed, 4, 0))
    if method == "arat":
        start = x + (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * attack.eps
        start = start if aliased else start.clamp(0, 1)
    else:
        start = x + 0.001 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    centre = start if aliased else x
    net.train()
    reference.use_branch(net, "adv")
    clean = net(centre).detach().softmax(1)
    expected = start
    for _ in range(2):
        expected = expected.detach().requires_grad_()
        log_p = net(expected).log_softmax(1)
        loss = -(clean * log_p).sum() if method == "trades" else -log_p[y, y].sum()
        (g,) = torch.autograd.grad(loss, expected)
        delta = (expected + attack.alpha * g.sign() - centre).clamp(-attack.eps, attack.eps)
        expected = (centre + delta).clamp(0, 1).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_images_to_recalibrate_ordinary_training_by_are_clean() -> None:
    x, y = torch.rand(6, 3, 8, 8).round(), torch.arange(6)
    config = TrainConfig(method="standard")
    (found,) = adversarial_images(config, network(), [Batch(x, y, torch.arange(6))], 4)
    assert torch.equal(found, x)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_run_with_averages(
    engine: Literal["fast", "reference"],
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
) -> None:
    tiny_config = dataclasses.replace(tiny_config, engine=engine)
    averaging = dataclasses.replace(tiny_config.averaging, swa_start=2, swa_every=2, ema_decay=0.8)
    trainer = Trainer(dataclasses.replace(tiny_config, averaging=averaging), digits[0], tmp_path / "run")
    trainer.run()
    # Batches of an epoch: 3, so steps 6..8 and 9..11; 6, 8 and 10 are even.
    assert trainer.averages["swa"].count == 3
    assert trainer.averages["ema"].count == 9
    networks = {
        kind: load_run(tmp_path / "run", torch.device("cpu"), kind).network for kind in ("last", "swa", "ema")
    }
    for kind, average in trainer.averages.items():
        expected = trainer.engine.plain_network(average.values)
        for ours, averaged in zip(networks[kind].parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, averaged)
    live = trainer.engine.plain_network()
    for ours, last in zip(networks["last"].parameters(), live.parameters(), strict=True):
        assert torch.equal(ours, last)
    statistic = "layer3.0.bn2.adv.running_var"
    assert not torch.equal(
        dict(networks["swa"].named_buffers())[statistic], dict(networks["last"].named_buffers())[statistic]
    )
    clean = "layer3.0.bn2.clean.running_var"
    assert torch.equal(
        dict(networks["swa"].named_buffers())[clean], dict(networks["last"].named_buffers())[clean]
    )
    assert load_run(tmp_path / "run", torch.device("cpu")).weights == "swa"


def test_an_extended_run_recalibrates_its_averages_anew(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    averaging = dataclasses.replace(tiny_config.averaging, swa_start=1, swa_every=1, ema_decay=0.5)
    short = dataclasses.replace(tiny_config, averaging=averaging, epochs=1)
    Trainer(short, digits[0], tmp_path / "run").run()
    longer = Trainer(dataclasses.replace(short, epochs=2), digits[0], tmp_path / "run", resume=True)
    longer.run()
    for name, average in longer.averages.items():
        network = load_run(tmp_path / "run", torch.device("cpu"), name).network
        expected = longer.engine.plain_network(average.values)
        for ours, averaged in zip(network.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, averaged)


def test_averages_are_forgotten_while_a_longer_run_trains(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    averaging = dataclasses.replace(tiny_config.averaging, swa_start=1, swa_every=1)
    config = dataclasses.replace(tiny_config, averaging=averaging, epochs=1, validation=20)
    Trainer(config, digits[0], tmp_path / "run").run()
    longer = Trainer(dataclasses.replace(config, epochs=2), digits[0], tmp_path / "run", resume=True)
    longer.best_accuracy = -1.0  # so that best.pt is written after epoch 2
    longer.run()
    assert load_checkpoint(longer.directory.best)["recalibrated"] == {}
    assert load_checkpoint(longer.directory.last)["recalibrated"].keys() == {"swa"}


def test_an_average_without_a_snapshot_is_named(
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    averaging = dataclasses.replace(tiny_config.averaging, swa_start=3, swa_every=500)
    Trainer(dataclasses.replace(tiny_config, averaging=averaging), digits[0], tmp_path / "run").run()
    assert "the swa average took no snapshot" in caplog.text
    late = dataclasses.replace(averaging, swa_start=4)
    with pytest.raises(UserError, match="swa-start 4 is beyond the 3 epochs"):
        Trainer(dataclasses.replace(tiny_config, averaging=late), digits[0], tmp_path / "late")
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("every", [1, 4])
def test_state_of_an_average_survives_saving(every: int) -> None:
    average = WeightAverage(network(0))
    for seed in range(every):
        average.update(network(seed))
    other = WeightAverage(network(9))
    other.load_state_dict(average.state_dict())
    assert other.count == every
    assert all(torch.equal(other.values[n], v) for n, v in average.values.items())
