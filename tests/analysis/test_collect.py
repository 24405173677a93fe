"""Collection while training: what is written, and that training does not notice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from arat_fast.analysis.collect import FILE, Collector, collected, running_means
from arat_fast.analysis.gradient_conflict import measure_conflict
from arat_fast.config import TrainConfig
from arat_fast.errors import TrainingError
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def collector(config: TrainConfig, folder: Path, every: int = 2) -> Collector:
    return Collector(every, folder, config=config, channels=1, num_classes=10, device=CPU)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    from arat_fast.config import load_recipe

    made = load_recipe("digits")
    attack = dataclasses.replace(made.attack, steps=2, loss="ce", start="uniform", bn="batch")
    return dataclasses.replace(made, epochs=2, batch_size=32, limit_train=96, device="cpu", attack=attack)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_training_goes_on_to_the_same_weights(
    config: TrainConfig, engine: str, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    config = dataclasses.replace(config, engine=engine)  # type: ignore[arg-type]
    plain = Trainer(config, digits[0], tmp_path / "plain")
    plain.run()
    collecting = Trainer(dataclasses.replace(config, analysis_every=2), digits[0], tmp_path / "collecting")
    collecting.run()
    for name, value in plain.engine.state().items():
        assert torch.equal(value, collecting.engine.state()[name]), name

    lines = collected(tmp_path / "collecting")
    # Three batches an epoch: steps 3 to 8, of which the even ones are measured.
    assert [(line["step"], line["epoch"]) for line in lines.conflict] == [(4, 1), (6, 2), (8, 2)]
    for line in lines.conflict:
        assert 0 < line["overall"]["share"] < 1
        assert -1 <= line["overall"]["cosine"] <= 1
        assert line["seconds"] > 0
        assert line["overall"]["coordinates"] == sum(v["coordinates"] for v in line["layers"].values())
    assert [line["epoch"] for line in lines.snapshots] == [1, 2]
    state = collecting.engine.state()
    for branch in ("clean", "adv"):
        means = lines.snapshots[-1]["branches"][branch]
        assert len(means) == 9
        recorded = torch.tensor(means["layer3.0.bn2"])
        torch.testing.assert_close(
            recorded, state[f"network.layer3.0.bn2.{branch}.running_mean"], rtol=1e-5, atol=1e-7
        )


def test_the_measured_conflict_is_that_of_the_present_weights(config: TrainConfig, tmp_path: Path) -> None:
    from arat_fast.analysis.gradient_conflict import reference_method
    from arat_fast.training.build import build_network

    still = dataclasses.replace(config, attack=dataclasses.replace(config.attack, eps=0.0, alpha=0.0))
    method = reference_method(still, build_network(still, 1, 10))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(1.1)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    made = collector(still, tmp_path, every=5)
    made.after_step(10, 1, state=method.state_dict, batch=lambda: (images, labels))
    (line,) = collected(tmp_path).conflict
    expected = measure_conflict(method, images, images, labels)["trained"].overall
    assert line["overall"]["share"] == expected.share
    assert line["overall"]["cosine"] == pytest.approx(expected.cosine, rel=1e-6)


def test_nothing_is_computed_when_nothing_is_due(config: TrainConfig, tmp_path: Path) -> None:
    def fail() -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("asked for a batch")

    collector(config, tmp_path, every=5).after_step(11, 1, state=dict, batch=fail)
    assert not (tmp_path / FILE).exists()


def test_a_method_without_an_invariance_term_collects_means_alone(
    config: TrainConfig, tmp_path: Path
) -> None:
    standard = dataclasses.replace(config, method="standard")
    made = collector(standard, tmp_path, every=1)
    state = {"network.bn1.running_mean": torch.tensor([0.1234567, 2.0])}
    made.after_step(3, 1, state=lambda: state, batch=lambda: pytest.fail("asked for a batch"))
    made.end_epoch(1, 3, state=lambda: state)
    lines = collected(tmp_path)
    assert lines.conflict == []
    assert lines.snapshots[0]["branches"] == {"adv": {"bn1": [0.123457, 2.0]}}


def test_lines_that_will_be_trained_again_are_forgotten(config: TrainConfig, tmp_path: Path) -> None:
    made = collector(config, tmp_path)
    made.forget_from(3)  # nothing yet
    for epoch, step in ((1, 5), (2, 8), (3, 11)):
        made.end_epoch(epoch, step, state=dict)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "confl')  # cut short by a crash
    made.forget_from(8)
    assert [line["step"] for line in collected(tmp_path).snapshots] == [5]
    assert not list(tmp_path.glob("*.tmp"))
    json.loads((tmp_path / FILE).read_text())


def test_branches_of_a_state() -> None:
    one = torch.ones(1)
    state = {
        "network.layer1.0.bn1.clean.running_mean": one,
        "network.layer1.0.bn1.adv.running_mean": 2 * one,
        "network.layer1.0.bn1.adv.running_var": one,
        "predictors.0.1.running_mean": one,
    }
    assert running_means(state) == {"clean": {"layer1.0.bn1": [1.0]}, "adv": {"layer1.0.bn1": [2.0]}}


def test_bad_use(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        collector(config, tmp_path, every=0)
    with pytest.raises(TrainingError, match="cannot write"):
        collector(config, tmp_path / "absent").end_epoch(1, 3, state=dict)
    assert collected(tmp_path / "absent").conflict == []
