"""Accuracy over the radius on a trained network."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from arat_fast.analysis.images import attack_as_trained, attacked_batches, training_batches
from arat_fast.analysis.mixture import measure_mixture
from arat_fast.analysis.tradeoff import MULTIPLES, measure_epsilons
from arat_fast.config import AttackConfig, TrainConfig
from arat_fast.errors import UserError
from arat_fast.evaluation.network import TrainedNetwork, load_run
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(digits: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> TrainedNetwork:
    from arat_fast.config import load_recipe

    config = load_recipe("digits")
    config = dataclasses.replace(
        config,
        epochs=3,
        device="cpu",
        attack=dataclasses.replace(config.attack, steps=2),
        evaluation=dataclasses.replace(config.evaluation, steps=5),
    )
    folder: Path = tmp_path_factory.mktemp("trained") / "run"
    Trainer(config, digits[0], folder).run()
    return load_run(folder, CPU)


def with_evaluation(trained: TrainedNetwork, **changes: object) -> TrainedNetwork:
    evaluation = dataclasses.replace(trained.config.evaluation, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(trained, config=dataclasses.replace(trained.config, evaluation=evaluation))


def test_accuracy_falls_with_the_radius(trained: TrainedNetwork, digits: tuple[ImageSet, ImageSet]) -> None:
    seen: list[int] = []
    result = measure_epsilons(trained, digits[1].first(60), device=CPU, progress=seen.append)
    points = result["points"]
    assert [p["eps"] for p in points] == pytest.approx([m * 0.12 for m in MULTIPLES])
    assert [p["alpha"] for p in points] == pytest.approx([m * 0.03 for m in MULTIPLES])
    assert all(later["accuracy"] <= earlier["accuracy"] + 0.05 for earlier, later in pairwise(points))
    assert points[-1]["accuracy"] < points[0]["accuracy"]
    assert sum(seen) == len(MULTIPLES) * 60
    wide = with_evaluation(trained, eps=0.5)
    assert measure_epsilons(wide, digits[1].first(10), device=CPU)["points"][-1]["eps"] == 1.0
    none = measure_epsilons(with_evaluation(trained, eps=0.0), digits[1].first(10), device=CPU)
    assert [p["eps"] for p in none["points"]] == [0.0]


def test_no_radius_no_distance(trained: TrainedNetwork, digits: tuple[ImageSet, ImageSet]) -> None:
    def distances(eps: float) -> list[float]:
        attacked = attacked_batches(
            with_evaluation(trained, eps=eps), digits[1].first(20), seed=0, device=CPU
        )
        return [layer["distance"] for layer in measure_mixture(trained.network, attacked)["layers"].values()]

    assert set(distances(0.0)) == {0.0}
    near, far = distances(0.03), distances(0.12)
    assert all(0 < a < b for a, b in zip(near, far, strict=True))


def test_the_attack_of_training(trained: TrainedNetwork) -> None:
    network = trained.network
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def attacked(scale: float = 1.0, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        attack = AttackConfig(eps=0.1, alpha=0.05, steps=2, **changes)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        return attack_as_trained(network, images, labels, attack, "arat", generator, scale)

    centre, x_adv = attacked()
    assert centre is images
    assert float((x_adv - images).abs().max()) == pytest.approx(0.1, abs=1e-6)
    _, halfway = attacked(scale=0.5)
    assert float((halfway - images).abs().max()) == pytest.approx(0.05, abs=1e-6)
    centre, x_adv = attacked(aliased_start=True)
    assert 0 < float((centre - images).abs().max()) <= 0.1
    assert float((x_adv - centre).abs().max()) <= 0.1 + 1e-6
    different = [attacked(start=start)[1] for start in ("none", "normal", "uniform")]
    assert not any(torch.equal(a, b) for a, b in pairwise(different))
    seen: list[torch.Tensor] = []
    with network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().clone())):
        images = images.round()  # black and white: half of the noise leaves [0, 1]
        for start, leaves in (("normal", True), ("uniform", False)):
            seen.clear()
            attacked(start=start)
            assert torch.equal(seen[0], seen[0].clamp(0, 1)) != leaves
    assert not torch.equal(attacked(bn="batch")[1], attacked(bn="running")[1])
    assert not torch.equal(attacked(branch="clean")[1], attacked(branch="adv")[1])
    assert not torch.equal(attacked(loss="kl")[1], attacked(loss="ce")[1])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_batches_are_those_of_training(tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet]) -> None:
    config = dataclasses.replace(tiny_config, validation=30, limit_train=120)
    batches = list(training_batches(config, digits[0], epoch=4, count=9, device=CPU))
    assert [len(labels) for _, labels in batches] == [32, 32, 26]  # 90 images: the held out ones left out
    again = next(training_batches(config, digits[0], epoch=4, count=1, device=CPU))
    assert torch.equal(batches[0][0], again[0])
    other = next(training_batches(config, digits[0], epoch=5, count=1, device=CPU))
    assert not torch.equal(batches[0][1], other[1])


def test_data_of_another_shape(trained: TrainedNetwork, digits: tuple[ImageSet, ImageSet]) -> None:
    from arat_fast.analysis.run import analyse_run

    train, test = digits
    other = dataclasses.replace(test, images=test.images[:, :6])
    with pytest.raises(UserError, match="was trained on images of"):
        analyse_run(trained.run, train, other, ["margin"], device=CPU)
