"""A loss that stops being finite: the run ends, names step and term, and keeps the last good weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from arat_fast import methods, reference
from arat_fast.config import TrainConfig
from arat_fast.errors import TrainingError
from arat_fast.loaders.images import ImageSet
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.trainer import Trainer


def test_guard_undoes_the_bad_step_and_all_that_follow() -> None:
    weight, statistic = torch.zeros(3), torch.zeros(2)
    guard = FiniteGuard([weight], [statistic])

    def step(number: int, *terms: float, spoil: bool = False) -> None:
        guard.before()
        weight.add_(1)
        statistic.add_(1)
        if spoil:
            weight[1] = torch.inf
        guard.after([torch.tensor(t) for t in terms], number)

    step(7, 1.0, 2.0)
    assert guard.failure(["a", "b"]) is None
    step(8, 1.0, float("nan"))
    assert guard.failure(["a", "b"]) == (8, "b")
    step(9, float("inf"), 2.0)
    step(10, 1.0, 2.0)  # fine again, but sticky
    assert guard.failure(["a", "b"]) == (8, "b")
    assert weight.tolist() == [1, 1, 1]
    assert statistic.tolist() == [1, 1]


@pytest.mark.parametrize("step", [0, 3])
def test_guard_sees_weights_that_a_finite_loss_spoiled(step: int) -> None:
    weight = torch.zeros(3)
    guard = FiniteGuard([weight], [])
    guard.before()
    weight[0] = torch.nan
    guard.after([torch.tensor(1.0)], step)
    assert guard.failure(["loss"]) == (step, "weights")
    assert weight.tolist() == [0, 0, 0]


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("bad", ["ce_adv", "ce_clean", "invariance"])
def test_run_stops_and_saves_the_last_good_weights(
    bad: str,
    engine: Literal["fast", "reference"],
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second step of epoch 2 gets a NaN in one term; the state before it must come back."""
    tiny_config = dataclasses.replace(tiny_config, engine=engine)
    owner: Any = reference.ARAT if engine == "reference" else methods.ARAT
    original = owner.loss
    calls = 0
    kept: dict[str, torch.Tensor] = {}

    def spoiled(self: nn.Module, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        result = original(self, *arguments)
        if calls == 5:
            terms = result[0] if engine == "reference" else result
            terms[bad] = terms[bad] * torch.nan
        return result

    original_iterate = Trainer._iterate

    def iterate(trainer: Trainer, batch: object) -> None:
        if calls == 4:
            kept.update({k: v.clone() for k, v in trainer.engine.state().items()})
        original_iterate(trainer, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(owner, "loss", spoiled)
    monkeypatch.setattr(Trainer, "_iterate", iterate)
    trainer = Trainer(tiny_config, digits[0], tmp_path / "run")
    with pytest.raises(TrainingError, match=rf"{bad} is not finite in iteration 5 \(epoch 2, batch 2\)"):
        trainer.run()
    good = load_checkpoint(tmp_path / "run" / "last_good.pt")["method"]
    assert all(torch.equal(good[name], value) for name, value in kept.items())
    assert all(torch.isfinite(v).all() for v in good.values())
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 2  # epoch 1 is complete and intact


def test_a_learning_rate_that_diverges(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, learning_rate=1e38)
    with pytest.raises(TrainingError, match=r"not finite in iteration .* Lower --learning-rate"):
        Trainer(config, digits[0], tmp_path / "run").run()
    assert (tmp_path / "run" / "last_good.pt").exists()
