"""Every method as a run: digits and real CIFAR-10, resume to the last bit, evaluation, teachers."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.config import EMRConfig, LBGATConfig, MAILConfig, TrainConfig, load_recipe
from arat_fast.errors import UserError
from arat_fast.evaluation.network import load_run
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.results import evaluate_run
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.sources import load
from arat_fast.methods import ARREST, METHODS
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.engine import build_engine
from arat_fast.training.fast_engine import FastEngine
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")
# name of the case: method, and what is set besides
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | {
    "lbgat, beta": ("lbgat", {"lbgat": LBGATConfig(beta=1.0, teacher="resnet8")}),
    "at+emr": ("at", {"emr": EMRConfig(0.01, 40.0)}),
    "arat+emr": ("arat", {"emr": EMRConfig(0.01, 1.0)}),
    "mail-trades+emr": (
        "mail-trades",
        {"emr": EMRConfig(0.01, 0.1), "mail": MAILConfig(start_epoch=2, warm_up="at")},
    ),
}


@pytest.fixture(scope="module")
def teacher(digits: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an ordinarily trained network."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    config = dataclasses.replace(load_recipe("digits"), method="standard", epochs=4, limit_train=480)
    Trainer(dataclasses.replace(config, device="cpu"), digits[0], run).run()
    return run


def configured(base: TrainConfig, case: str, teacher: Path) -> TrainConfig:
    method, settings = CASES[case]
    arrest = dataclasses.replace(base.arrest, teacher=str(teacher))
    mail = dataclasses.replace(base.mail, start_epoch=2)
    return dataclasses.replace(base, **({"method": method, "arrest": arrest, "mail": mail} | settings))


@pytest.mark.parametrize("case", CASES)
def test_digits_train_resume_and_evaluate(
    case: str, tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], teacher: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(configured(tiny_config, case, teacher), epochs=3)
    whole = Trainer(config, digits[0], tmp_path / "whole")
    whole.run()
    lines = whole.directory.metrics()
    assert all(math.isfinite(v) for line in lines for v in line.values())
    # Weights change what is minimised at epoch 2, so MAIL is judged by its clean or adversarial accuracy.
    if case.startswith("mail"):
        name = "accuracy_clean" if "accuracy_clean" in lines[0] else "accuracy_adv"
        assert lines[-1][name] > lines[0][name]
    else:
        assert lines[-1]["loss"] < lines[0]["loss"]

    part = Trainer(dataclasses.replace(config, epochs=1), digits[0], tmp_path / "part")
    part.run()
    rest = Trainer(config, digits[0], tmp_path / "part", resume=True)
    rest.run()
    one, other = (load_checkpoint(tmp_path / f / "last.pt")["method"] for f in ("whole", "part"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    trained = load_run(tmp_path / "whole", CPU)
    x = torch.from_numpy(digits[1].images[:20]).permute(0, 3, 1, 2).float() / 255
    whole.network.eval()
    ours = whole.network(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(trained.network(x), ours, rtol=1e-4, atol=1e-4)
    record = evaluate_run(
        tmp_path / "whole", digits[1], ["clean", "pgd2"], device=CPU, options=EvaluationOptions(limit=40)
    )
    assert record["figures"]["clean"]["accuracy"] >= record["figures"]["pgd2"]["accuracy"]


def test_arrests_teacher_is_in_the_checkpoint(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], teacher: Path, tmp_path: Path
) -> None:
    """The student starts from the teacher; the teacher stays as it was; resuming needs no teacher's run."""
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    config = dataclasses.replace(configured(tiny_config, "arrest", own), epochs=1)
    weights = load_run(own, CPU).network.state_dict()
    trainer = Trainer(config, digits[0], tmp_path / "run")
    for name, value in trainer.engine.plain_network().state_dict().items():
        assert torch.equal(value, weights[name])
    trainer.run()
    shutil.rmtree(own)
    rest = Trainer(dataclasses.replace(config, epochs=2), digits[0], tmp_path / "run", resume=True)
    assert isinstance(rest.engine, FastEngine)
    assert isinstance(rest.engine.method, ARREST)
    rest.run()
    assert not torch.equal(
        rest.engine.plain_network().get_parameter("linear.weight"), weights["linear.weight"]
    )
    for name, value in rest.engine.method.teacher.state_dict().items():
        assert torch.equal(value.reshape(weights[name].shape), weights[name])
    with pytest.raises(UserError, match=r"no run directory"):
        Trainer(config, digits[0], tmp_path / "new")


def test_a_teacher_that_does_not_fit_is_refused(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], teacher: Path, tmp_path: Path
) -> None:
    config = configured(tiny_config, "arrest", teacher)
    with pytest.raises(UserError, match="is a resnet8 of 10 classes, 1 channels; expected a resnet18"):
        build_engine(dataclasses.replace(config, model="resnet18"), 1, 10, CPU)
    split = dataclasses.replace(tiny_config, method="arat", epochs=1)
    Trainer(split, digits[0], tmp_path / "arat").run()
    with pytest.raises(UserError, match="two BatchNorm branches"):
        build_engine(configured(tiny_config, "arrest", tmp_path / "arat"), 1, 10, CPU)


def test_the_optimizer_trains_predictors_and_lbgats_teacher_but_not_arrests(
    tiny_config: TrainConfig, teacher: Path
) -> None:
    count = {}
    for case in ("at", "arat", "lbgat", "arrest"):
        engine = build_engine(configured(tiny_config, case, teacher), 1, 10, CPU)
        count[case] = sum(p.numel() for p in engine.optimizer.param_groups[0]["params"])
        assert all(p.requires_grad for p in engine.parameters())
    assert count["lbgat"] == 2 * count["at"]
    assert count["arrest"] == count["at"] < count["arat"]


def test_weights_depend_on_the_seed_alone(tiny_config: TrainConfig, teacher: Path) -> None:
    """Student and teacher of LBGAT: the same again, and other ones with another seed."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed * 100 + len(states))
        config = dataclasses.replace(configured(tiny_config, "lbgat", teacher), seed=seed)
        states.append(build_engine(config, 1, 10, CPU).state())
    for name in ("network.conv1.weight", "teacher.conv1.weight"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_256_images_of_cifar10(case: str, cifar_root: Path, teacher: Path, tmp_path: Path) -> None:
    train, test = load("cifar10", str(cifar_root))
    base = load_recipe("at-cifar10-resnet18")
    base = dataclasses.replace(
        base, model="resnet8", epochs=1, batch_size=32, limit_train=256, learning_rate=0.02,
        first_epoch_learning_rate=None, device="cpu", compile=False,
        attack=dataclasses.replace(base.attack, steps=2), lbgat=LBGATConfig(teacher="resnet8"),
    )  # fmt: skip
    if case == "arrest":
        teacher = tmp_path / "teacher"
        Trainer(dataclasses.replace(base, method="standard"), train, teacher).run()
    config = configured(base, case, teacher)
    trainer = Trainer(config, train, tmp_path / "run")
    losses = []
    original = trainer.engine.iterate

    def iterate(*arguments: Any) -> dict[str, torch.Tensor]:
        metrics = original(*arguments)
        losses.append(float(metrics["loss"]))
        return metrics

    trainer.engine.iterate = iterate  # type: ignore[method-assign]
    trainer.run()
    assert len(losses) == 8
    assert all(math.isfinite(v) for v in losses)
    assert sum(losses[-2:]) < sum(losses[:2])
    record = evaluate_run(
        tmp_path / "run", test, ["clean", "pgd2"], device=CPU, options=EvaluationOptions(limit=64)
    )
    assert 0 <= record["figures"]["pgd2"]["accuracy"] <= 1
