"""`arat-fast runs` and TensorBoard's events: what lies in a folder of runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from arat_fast.cli import main
from arat_fast.commands.runs import describe_run
from arat_fast.config import EMRConfig, TrainConfig
from arat_fast.loaders.images import ImageSet
from arat_fast.training.directory import LAST_GOOD, RunDirectory
from arat_fast.training.trainer import Trainer


@pytest.fixture
def folder(tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> Path:
    Trainer(dataclasses.replace(tiny_config, epochs=1), digits[0], tmp_path / "done").run()
    (tmp_path / "done" / "results.json").write_text(
        json.dumps({"arat": {"clean": 0.5, "pgd2": 0.25, "n": 40}})
    )
    Trainer(tiny_config, digits[0], tmp_path / "deep" / "stopped").directory.release()
    return tmp_path


def test_states_and_figures(
    folder: Path,
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    capsys: pytest.CaptureFixture[str],
) -> None:
    live = Trainer(tiny_config, digits[0], folder / "live")
    failed = Trainer(tiny_config, digits[0], folder / "failed")
    failed.directory.release()
    (folder / "failed" / LAST_GOOD).write_bytes(b"")
    assert main(["runs", str(folder), "--json"]) == 0
    runs = {Path(r["run"]).name: r for r in json.loads(capsys.readouterr().out)}
    states = {name: run["state"] for name, run in runs.items()}
    assert states == {"done": "complete", "stopped": "stopped", "live": "running", "failed": "failed"}
    assert runs["done"]["results"] == {"clean": 0.5, "pgd2": 0.25}
    assert (runs["done"]["epoch"], runs["done"]["epochs"]) == (1, 1)
    live.directory.release()
    assert describe_run(RunDirectory(folder / "live"))["state"] == "stopped"
    assert main(["runs", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "clean 50.0 %, PGD-2 25.0 %" in table


def test_emr_is_told_from_its_base(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, method="trades", emr=EMRConfig(coefficient=0.01))
    Trainer(config, digits[0], tmp_path / "run").directory.release()
    described = describe_run(RunDirectory(tmp_path / "run"))
    assert (described["method"], described["label"]) == ("trades", "trades + EMR")


def test_no_folder_and_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs under" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "absent")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_tensorboard_holds_each_epochs_figures(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(
        dataclasses.replace(tiny_config, epochs=2), digits[0], tmp_path / "run", tensorboard=True
    )
    trainer.run()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in trainer.directory.metrics()], rel=1e-5)


def test_a_checkpoint_cut_short_shows(folder: Path) -> None:
    checkpoint = folder / "done" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert describe_run(RunDirectory(folder / "done"))["state"] == "damaged"


def test_a_damaged_run_hides_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "deep" / "stopped" / "config.json").write_text("{")
    assert main(["runs", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "unreadable" in table
    assert "complete" in table


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", "{", '{"arat": 5}', '{"arat": {}}', '{"arat": {"clean": 0.9}}',
        '{"arat": {"clean": 0.9, "n": 0}}', '{"arat": {"clean": "0.9", "n": 40}}',
        '{"arat": {"clean": NaN, "n": 40}}', '{"arat": {"clean": 0.9, "n": true}}',
    ],
)  # fmt: skip
def test_damaged_results_are_left_out(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = folder / "done"
    (run / "results.json").write_text(text)
    assert main(["runs", str(folder), "--json"]) == 0
    described = {Path(r["run"]).name: r for r in json.loads(capsys.readouterr().out)}
    assert (described["done"]["state"], described["done"]["results"]) == ("complete", {})
    assert described["stopped"]["state"] == "stopped"
    assert "results.json is damaged and is left out" in caplog.text
    assert main(["compare", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["figures"] == {}


@pytest.mark.parametrize("damage", ["[]", "5", '{"epoch": 1}', '{"epoch": "1", "loss": 1}', "{\n5", None])
def test_damaged_metrics_make_a_run_unreadable(
    damage: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = folder / "done" / "metrics.jsonl"
    metrics.unlink()
    if damage is None:
        metrics.mkdir()
    else:
        metrics.write_text(damage + "\n")
    assert main(["runs", str(folder), "--json"]) == 0
    states = {Path(r["run"]).name: r["state"] for r in json.loads(capsys.readouterr().out)}
    assert states == {"done": "unreadable", "stopped": "stopped"}
    assert main(["compare", str(folder / "done")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_config_of_other_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "done" / "config.json").write_bytes(b"\xff\xfe{}")
    for command in ("compare", "evaluate"):
        assert main([command, str(folder / "done")]) == 2
        assert "config.json is no UTF-8 text" in capsys.readouterr().err
    assert main(["runs", str(folder)]) == 0
    assert "unreadable" in capsys.readouterr().out


def test_whose_figures_results_json_holds(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    """Of the folder above a run has figures only where `train --with-standard` put it there."""

    def results(place: Path) -> object:
        return describe_run(RunDirectory(place))["results"]

    outer, standard = tmp_path / "outer", dataclasses.replace(tiny_config, method="standard")
    places = {outer: tiny_config, outer / "standard": standard, outer / "again": tiny_config,
              outer / "other": standard}  # fmt: skip
    for place, config in places.items():
        Trainer(config, digits[0], place).directory.release()
    both = {"arat": {"clean": 0.5, "n": 40}, "standard": {"clean": 0.75, "n": 40}}
    (outer / "results.json").write_text(json.dumps(both))
    assert [results(place) for place in places] == [{"clean": 0.5}, {"clean": 0.75}, {}, {}]
    (outer / "results.json").write_text(json.dumps({"standard": both["standard"]}))
    assert results(outer / "standard") == {}


def test_resuming_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run-dir", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no run to resume; to start one there, say which: --config NAME" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
