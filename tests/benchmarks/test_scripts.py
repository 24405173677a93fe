"""The scripts of bench/: sound shell, results that come back, weights that come together again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BENCH, load

from arat_fast.config import TrainConfig
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer


@pytest.mark.parametrize("script", ["gpu.sh", "train_cifar10.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(BENCH / script)], check=True)


def test_gpu_script_refuses_a_machine_without_one(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = subprocess.run(
        [str(BENCH / "gpu.sh")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PARTS": "none"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "no GPU" in result.stderr


def test_the_recipe_s_script_asks_for_autoattack_before_it_trains(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in *pyautoattack*) exit 1 ;; esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    result = subprocess.run(
        [str(BENCH / "train_cifar10.sh")],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(python),
            "OUT": str(tmp_path / "out"),
            "RUN": str(tmp_path / "run"),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "needs pyautoattack" in result.stderr
    assert not (tmp_path / "run").exists()


def test_packed_weights_come_together_again(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path, monkeypatch: Any
) -> None:
    import dataclasses

    Trainer(dataclasses.replace(tiny_config, epochs=1), digits[0], tmp_path / "run").run()
    script = load("pack_run")
    monkeypatch.setattr(script, "PART", 100_000)
    manifest = json.loads(script.pack(tmp_path / "run", tmp_path).read_text())
    assert len(manifest["parts"]) > 1
    assert all(part["bytes"] <= 100_000 for part in manifest["parts"])
    assert 0 < manifest["largest_change"] < 1e-3
    state = script.join(tmp_path, tmp_path / "weights.pt")
    network = script.load_run(tmp_path / "run", torch.device("cpu")).network
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name].to(value.dtype), value, rtol=1e-3, atol=1e-6)
    (tmp_path / "weights.pt.00").write_bytes(b"x")
    with pytest.raises(SystemExit, match="is damaged"):
        script.join(tmp_path, tmp_path / "weights.pt")


def _record(times: float, spread: list[float]) -> dict[str, Any]:
    variants = {
        "fast": {"seconds": 2e-3, "spread": [1e-3, 3e-3], "ours_is_faster_by": 1.0, "ratio_spread": [1, 1]},
        "eager": {"seconds": 1.0, "spread": [1, 1], "ours_is_faster_by": times, "ratio_spread": spread},
    }
    cases = {"step": {"ours": "fast", "variants": variants, "mfu": 0.25}}
    conditions = {"date": "2026-11-21T00:00:00", "revision": "abc", "load_average": [0.5, 0, 0]}
    return {"cases": cases, "conditions": conditions}


def test_suite_says_what_changed_since_the_last_committed_result() -> None:
    compared = load("suite_results").compared
    lines = list(compared(_record(2.0, [1.9, 2.1]), _record(3.0, [2.8, 3.2])))
    assert lines[0] == "step: fast 2 ms (1 ms - 3 ms), 25 % MFU"
    assert lines[1] == "      2.00 x eager (1.90 - 2.10), committed 3.00 x: SLOWER"
    assert "load 0.5" in lines[-1]
    lines = list(compared(_record(2.0, [1.5, 2.9]), _record(3.0, [2.8, 3.2])))
    assert lines[1].endswith("committed 3.00 x")  # spreads that meet prove nothing
    assert "nothing committed yet" in list(compared(_record(2.0, [1, 3]), None))[-1]
