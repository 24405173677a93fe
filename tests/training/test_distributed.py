"""Two processes on the CPU (gloo): the mathematics of one, one run directory, resume with another number."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.loaders.images import ImageSet
from arat_fast.training.distributed import ALONE, World, averaged_over_ranks
from arat_fast.training.trainer import Trainer

HERE = Path(__file__).parent


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [*command, "--nproc-per-node", str(processes), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    """Losses, weights, statistics over three iterations in float64, the attack included: ranks.py."""
    result = torchrun(str(HERE / "ranks.py"), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}


@pytest.mark.slow
def test_one_run_directory_and_resume_with_another_world_size(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared = (
        "train",
        "--config",
        "digits",
        "--limit-train",
        "128",
        "--attack.steps",
        "2",
        "--run-dir",
        str(run),
    )
    first = torchrun("-m", "arat_fast.cli", *shared, "--epochs", "2", "--no-evaluate", "--sync-bn")
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("run: ") == 1  # rank 0 alone reports
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    alone = [
        sys.executable,
        "-m",
        "arat_fast.cli",
        *shared,
        "--sync-bn",
        "--epochs",
        "3",
        "--resume",
        "--no-evaluate",
    ]
    second = subprocess.run(alone, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "lr 0.02 " in first.stderr
    scaled = ("--batch-per-process", "--epochs", "1", "--no-evaluate", "--batch-size", "33")
    other = torchrun("-m", "arat_fast.cli", *shared[:-1], str(tmp_path / "scaled"), *scaled)
    assert other.returncode == 0, other.stderr[-3000:]
    assert "lr 0.04 " in other.stderr  # two processes' worth
    third = torchrun(
        "-m", "arat_fast.cli", *shared, "--sync-bn", "--epochs", "4", "--resume", "--evaluation.limit", "20",
        "--evaluation.steps", "2",
    )  # fmt: skip
    assert third.returncode == 0, third.stderr[-3000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "PGD" in third.stdout or "pgd" in third.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 33}, "--batch-size 33 does not divide among 2 processes"),
        ({"engine": "reference"}, "--engine reference runs in one process"),
    ],
)
def test_what_does_not_divide_is_refused(
    change: dict[str, Any],
    message: str,
    tiny_config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(dataclasses.replace(tiny_config, **change), digits[0], tmp_path / "run", world=World(0, 2))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_process_alone_needs_no_communication() -> None:
    assert ALONE.local_batch(33) == 33
    assert ALONE.any(True)
    assert not ALONE.any(False)
    value = torch.tensor(3.0)
    assert ALONE.total(value) is value
    assert ALONE.from_main("x") == "x"
    assert averaged_over_ranks(torch.nn.Linear(2, 2), torch.nn.Identity(), ALONE) is None
    assert World(1, 4).local_batch(128) == 32
    with pytest.raises(UserError, match="--batch-size 6 does not divide among 4 processes"):
        World(1, 4).local_batch(6)
