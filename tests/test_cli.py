"""The command line as a user meets it: runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from arat_fast.cli import main

TINY = ["--config", "digits", "--limit-train", "96", "--batch-size", "32", "--attack.steps", "2",
        "--evaluation.steps", "2", "--evaluation.limit", "40", "--device", "cpu"]  # fmt: skip


def arat_fast(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "arat_fast.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


def assert_one_message(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_help_names_the_commands_and_costs_no_import() -> None:
    started = time.perf_counter()
    result = arat_fast("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("train", "evaluate", "env", "--config digits"))
    assert time.perf_counter() - started < 5
    assert arat_fast("--version").stdout.startswith("arat-fast 0.")
    train = arat_fast("train", "--help")
    assert train.returncode == 0
    for flag in (
        "--config",
        "--data-root",
        "--run-dir",
        "--epochs",
        "--limit-train",
        "--attack.aliased-start",
    ):
        assert flag in train.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["train", "--epoch", "3"],
        ["runs", "."],
        ["compare", "nowhere"],
        ["evaluate", "--help"],
        ["evaluate", "nowhere", "--attacks", "pdg20"],
    ],
)
def test_torch_is_not_waited_for_where_nothing_needs_it(arguments: list[str], tmp_path: Path) -> None:
    script = f"""import sys
from arat_fast.cli import main
try:
    main({arguments})
except SystemExit:
    pass
sys.exit("torch" in sys.modules)"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout + result.stderr


def test_dry_run_prints_configuration_and_cost() -> None:
    result = arat_fast("train", "--config", "arat-cifar10-resnet18", "--dry-run", "--attack.eps", "4/255")
    assert result.returncode == 0
    text, cost = result.stdout.split("\n\n", 1)
    config = yaml.safe_load(text)
    assert config["attack"]["eps"] == "4/255"
    assert config["arat"]["gamma"] == 30
    assert "11,183,562 (+ 527,360 of predictors)" in cost
    assert "1.111 GFLOP" in cost
    assert "10 input gradients, 2 full" in cost
    assert "28.88 GFLOP" in cost


def test_a_run_its_files_and_its_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = arat_fast("train", *TINY, "--epochs", "2", "--run-dir", run, "--with-standard")
    assert result.returncode == 0, result.stderr
    assert "PGD-2" in result.stdout
    assert str(run) in result.stdout
    assert "\r" not in result.stderr  # no progress bar off a terminal
    for folder in (run, run / "standard"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2]
        assert {"loss", "ce_clean", "learning_rate", "images_per_second", "accuracy_clean"} <= set(lines[0])
        assert (folder / "last.pt").is_file()
        assert not list(folder.glob("*.tmp"))
    assert lines[0]["learning_rate"] == 0.02
    assert json.loads((run / "config.json").read_text())["attack"]["eps"] == "0.12"
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"arat", "standard"}
    assert {"clean", "pgd2", "n"} <= set(results["arat"])

    record_file = tmp_path / "record.json"
    options = ["--attacks", "clean,pgd2,pgd2-margin", "--limit", "40", "--json", record_file]
    evaluated = arat_fast("evaluate", run, *options)
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads(record_file.read_text())
    assert record["figures"]["clean"]["accuracy"] == results["arat"]["clean"]
    assert record["figures"]["pgd2"]["accuracy"] == results["arat"]["pgd2"]
    assert record["figures"]["pgd2-margin"]["loss"] == "margin"
    assert record["figures"]["pgd2"]["eps"] == "0.12"
    assert record["branch"] == "adv"
    assert len(record["checkpoint_sha256"]) == 64

    occupied = arat_fast("train", *TINY, "--run-dir", run)
    before = (run / "last.pt").read_bytes()
    assert_one_message(occupied, "already holds a run", "--resume")
    assert (run / "last.pt").read_bytes() == before
    other = arat_fast("evaluate", run, "--data-root", tmp_path, "--attacks", "pgd0")
    assert_one_message(other, "unknown attack 'pgd0'")


@pytest.mark.slow
def test_real_cifar10_on_a_cpu(cifar_root: Path, tmp_path: Path) -> None:
    options = ["--limit-train", "128", "--epochs", "1", "--attack.steps", "1", "--evaluation.limit", "32"]
    result = arat_fast(
        "train", "--config", "arat-cifar10-resnet18", "--data-root", cifar_root, *options,
        "--run-dir", tmp_path / "run", "--evaluation.steps", "1", "--evaluation.batch-size", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["invariance"] > 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "--config", "arat-cifar10-resnet81"], ["did you mean 'arat-cifar10-resnet18'"]),
        (["train", "--config", "digits", "--epoch", "3"], ["--epochs"]),
        (["train", "--config", "digits", "--attack.epz", "0.1"], ["--attack.eps"]),
        (["train", "--config", "digits", "--attack.eps", "wide"], ["'wide'", "8/255"]),
        (["train", "--config", "digits", "--epochs", "0"], ["epochs = 0", "greater than or equal to 1"]),
        (["train", "--config", "digits", "--model", "resnet-18"], ["did you mean 'resnet18'"]),
        (["train", "--config", "digits", "--dataset", "digit"], ["did you mean 'digits'"]),
        (["train", "--config", "digits", "--device", "cuda"], ["no GPU"]),
        (["train", "--config", "digits", "--resume"], ["--resume needs --run-dir"]),
        (["train", "--data-root", "nowhere"], ["nowhere: no such folder"]),
        (["train", "--config", "digits", "--batch-size", "31", "--limit-train", "32"], ["last batch of one"]),
        (["train", "--config", "digits", "--arat.layers", "layer9.0.bn1"], ["unknown layer 'layer9.0.bn1'"]),
        (["train", "--config", "digits", "--validation", "1442"], ["smaller --validation"]),
        (["evaluate", "nowhere"], ["nowhere is no run directory"]),
        (["evaluate", ".", "--attacks", "pgd20,autoatack"], ["unknown attack 'autoatack'", "autoattack"]),
        (["evaluate"], ["Missing from arat-fast evaluate"]),
        (["bench", "doctor", "--config", "digits", "--repeats", "0"], ["--repeats is 0"]),
        (["bench", "doctor", "--config", "digits", "--loader", "foo"], ["loader = 'foo'"]),
        (["bench", "doctor", "--config", "digits", "--batch-size", "-1"], ["batch_size = -1"]),
        (["bench", "step", "--prepared", "absent.json"], ["--prepared absent.json", "--prepare"]),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as error:  # tyro's own messages
        code = int(error.code or 0)
    assert code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_env_is_json() -> None:
    result = arat_fast("env")
    assert result.returncode == 0
    assert json.loads(result.stdout)["packages"]["torch"]


def test_occupied_and_unwritable_run_directories(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert_one_message(arat_fast("train", *TINY, "--run-dir", tmp_path / "full"), "is not empty")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    assert_one_message(arat_fast("train", *TINY, "--run-dir", tmp_path / "file" / "run"), "cannot write")
    assert (tmp_path / "file").read_text() == "precious"


def test_ctrl_c_saves_and_resume_finishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", *TINY, "--epochs", "400", "--run-dir", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "arat_fast.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "--resume" in rest
    assert "Traceback" not in rest
    done = len((run / "metrics.jsonl").read_text().splitlines())
    result = arat_fast("train", "--run-dir", run, "--resume", "--epochs", str(done + 1), "--no-evaluate")
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == done + 1
