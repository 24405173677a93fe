"""What bounds a run: the verdicts, from figures made up for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arat_fast import cli
from arat_fast.benchmarks import doctor
from arat_fast.benchmarks.doctor import REMEDIES, findings, main
from arat_fast.benchmarks.profiling import KINDS, Profile, of_trace


def profile(**changes: object) -> Profile:
    kinds = {"convolution": 0.5, "BatchNorm": 0.3, "other": 0.2}
    figures = {
        "busy_seconds": 0.1,
        "by_kind": kinds,
        "top": [],
        "idle_share": 0.02,
        "launches": 3.0,
        "kernels": 9,
    }
    return Profile(**(figures | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "changes", "worst"),
    [
        (500.0, {}, "loader"),
        (1050.0, {}, "loader"),  # less than 1.1 of the appetite
        (9000.0, {"idle_share": 0.4}, "launches and host"),
        (9000.0, {}, "convolution"),
        (9000.0, {"by_kind": {"BatchNorm": 0.7, "convolution": 0.3}}, "BatchNorm"),
        (9000.0, {"idle_share": None, "launches": None, "busy_seconds": 0.05}, "host"),
        (9000.0, {"idle_share": None, "launches": None}, "convolution"),
    ],
)
def test_the_worst_comes_first(loader: float, changes: dict[str, object], worst: str) -> None:
    found = findings(loader, 1000.0, profile(**changes), 0.1)
    assert found[0].what == worst
    assert found[0].remedy


def test_every_kind_of_work_has_a_remedy() -> None:
    assert set(KINDS) | {"other"} == set(REMEDIES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "digits", "--limit-train", "32", "--batch-size", "16", "--repeats", "1"]
    assert main([*arguments, "--json", str(tmp_path / "doctor.json")]) == 0
    assert "bounds you: " in capsys.readouterr().out
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert record["figures"]["loader_images_per_second"] > record["figures"]["iteration_images_per_second"]
    assert 0 < record["figures"]["attack_share"] < 1.5
    assert record["findings"][0]["what"] in {*KINDS, "other", "host"}


def test_a_profiler_that_sees_nothing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Profile:
        return of_trace([], 3)

    monkeypatch.setattr(doctor, "profiled", fail)
    arguments = ["--config", "digits", "--limit-train", "32", "--batch-size", "16", "--repeats", "1"]
    assert cli.main(["bench", "doctor", *arguments]) == 1
    assert "no profile, on which the findings rest" in capsys.readouterr().err
