"""Which evaluation records `arat-fast compare` takes: those of the run's own conditions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.commands.compare_figures import compared_run
from arat_fast.config import AveragingConfig, TrainConfig
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.results import evaluate_run
from arat_fast.loaders.images import ImageSet
from arat_fast.training.directory import RunDirectory
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")
OFFICIAL = {"accuracy": 0.4, "n": 20, "error_95": 0.2, "norm": "Linf"}


@pytest.fixture(scope="module")
def test_images(digits: tuple[ImageSet, ImageSet]) -> ImageSet:
    return digits[1].first(20)


@pytest.fixture
def run(tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> Path:
    Trainer(dataclasses.replace(tiny_config, epochs=1, validation=20), digits[0], tmp_path / "run").run()
    return tmp_path / "run"


def figures(run: Path, **records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of a run with these records, by their file's name, in its folder."""
    for name, record in records.items():
        (run / f"{name}.json").write_text(json.dumps(record))
    found: dict[str, dict[str, Any]] = compared_run(RunDirectory(run))["figures"]
    for name in records:
        (run / f"{name}.json").unlink()
    return found


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        (EvaluationOptions(eps=0.01), "pgd2 (eps 0.01, not 0.12)"),
        (EvaluationOptions(alpha=0.06), "pgd2 (alpha 0.06, not 0.03)"),
        (EvaluationOptions(restarts=2), "pgd2 (restarts 2, not 1)"),
    ],
)
def test_other_attacks_are_left_out(
    options: EvaluationOptions,
    condition: str,
    run: Path,
    test_images: ImageSet,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = evaluate_run(run, test_images, ["clean", "pgd2"], device=CPU, options=options)
    assert set(figures(run, other=record)) == {"clean", "clean_branch"}
    (warning,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "other.json" in warning
    assert condition in warning
    own = evaluate_run(run, test_images.first(10), ["pgd2", "pgd2-margin"], device=CPU)
    found = figures(run, other=record, own=own)
    assert (found["clean"]["n"], found["pgd2"]["n"], found["pgd2-margin"]["n"]) == (20, 10, 10)


def test_autoattack_of_another_ball_is_left_out(run: Path, test_images: ImageSet) -> None:
    record = evaluate_run(run, test_images, ["clean"], device=CPU)
    for changed, taken in (({"eps": "0.12"}, True), ({"eps": "0.01"}, False), ({"norm": "L2"}, False)):
        record["figures"] = {"autoattack": OFFICIAL | changed}
        assert bool(figures(run, attacked=record)) is taken


def test_best_weights_never_stand_for_the_last(
    run: Path, test_images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    best = evaluate_run(run, test_images, ["clean"], device=CPU, options=EvaluationOptions(weights="best"))
    last = evaluate_run(run, test_images.first(10), ["clean"], device=CPU)
    assert figures(run, best=best, last=last)["clean"]["n"] == 10
    assert "best.json is left out" in caplog.text


def test_averages_are_told_from_the_last_weights(
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    test_images: ImageSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    averaging = AveragingConfig(swa_start=1, swa_every=1, ema_decay=0.5)
    config = dataclasses.replace(tiny_config, epochs=1, averaging=averaging)
    Trainer(config, digits[0], tmp_path / "run").run()
    records = {
        weights: evaluate_run(
            tmp_path / "run",
            test_images.first(count),
            ["clean"],
            device=CPU,
            options=EvaluationOptions(weights=weights),
        )
        for weights, count in (("swa", 10), ("last", 20), ("ema", 15))
    }
    assert figures(tmp_path / "run", **records)["clean"]["n"] == 10
    for weights in ("last", "ema"):
        assert f"{weights}.json is left out: weights {weights}, not swa" in caplog.text


@pytest.mark.parametrize("damage", [5, {"clean": 0.5}, {"clean": {"accuracy": 0.5}}, {"clean": {"n": 5}}])
def test_a_damaged_record_is_left_out(
    damage: object, run: Path, test_images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    record = evaluate_run(run, test_images, ["clean"], device=CPU)
    assert figures(run, damaged=record | {"figures": damage}) == {}
    assert "damaged.json is a damaged record and is left out" in caplog.text
