"""`arat-fast bench step` and `bench attack` on tiny networks: agreement first, then the figures."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.benchmarks import attack, step
from arat_fast.benchmarks.alone import Start, start_of, starts
from arat_fast.benchmarks.attack_variants import build_attack, check_attacks, networks
from arat_fast.benchmarks.step_options import StepOptions, settled
from arat_fast.benchmarks.step_variants import (
    Observed,
    Setting,
    attack_of,
    build,
    check_agreement,
    data,
    observe,
    tolerance,
    variant_names,
)
from arat_fast.benchmarks.strong import StrongIteration
from arat_fast.errors import TrainingError, UserError

CPU = torch.device("cpu")
TINY = Setting("resnet8", 4, 8, 1, "fp32", "off")


def test_step_measures_every_variant_after_showing_that_they_agree(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "step.json"
    arguments = "--device cpu --model resnet8 --batch 4 --side 8 --steps 1 --repeats 2 --no-memory"
    assert (
        step.main([*arguments.split(), "--compile", "off", "--precision", "fp32", "--json", str(target)]) == 0
    )
    record = json.loads(target.read_text())
    names = ["eager", "fast", "strong", "eager-running", "fast-folded", "fast-guarded"]
    assert list(record["variants"]) == names
    for name, figures in record["variants"].items():
        low, high = figures["spread"]
        assert 0 < low <= figures["images_per_second"] <= high
        assert figures["ratio_spread"][0] <= figures["ratio"] <= figures["ratio_spread"][1]
        assert figures["baseline"] == (
            "eager-running" if name in ("eager-running", "fast-folded") else "eager"
        )
        assert figures["mfu"] > 0
        assert figures["bandwidth_share"] > 0
        assert figures["host_gap_share"] is None  # on a GPU only
        assert figures["captured"] is False
    assert record["variants"]["eager"]["ratio"] == record["variants"]["eager-running"]["ratio"] == 1
    assert record["variants"]["fast"]["profile"]["by_kind"]["convolution"] > 0
    given = record["conditions"]
    assert (given["model"], given["batch"], given["attack_steps"], given["compile"]) == (
        "resnet8",
        4,
        1,
        False,
    )
    assert given["copy_bytes_per_second"] > 0
    assert given["load_average"]
    out = capsys.readouterr().out
    assert "fast-folded" in out
    assert "where the time goes" in out


def test_variants_are_those_that_differ_here() -> None:
    names = variant_names(TINY, CPU)
    assert "fast-no-capture" not in names
    assert "fast-no-compile" not in names
    assert "fast-no-bf16" not in names
    assert "fast-no-join" not in names
    low = Setting("resnet8", 4, 8, 1, "bf16", "on")
    assert {"strong-compiled", "fast-no-compile", "fast-no-join", "fast-no-bf16"} <= set(
        variant_names(low, CPU)
    )
    assert "fast-no-capture" in variant_names(TINY, torch.device("cuda"))
    assert variant_names(TINY, CPU, "fast-folded") == ["eager-running", "fast-folded"]
    assert variant_names(TINY, CPU, "eager-compiled, fast") == ["eager", "fast", "eager-compiled"]
    with pytest.raises(UserError, match="did you mean 'fast-folded'"):
        variant_names(TINY, CPU, "fast-foldet")


def test_a_variant_that_computes_something_else_is_refused() -> None:
    images, labels = data(TINY, CPU)
    observed = {name: observe(build(TINY, CPU, name), images, labels) for name in ("eager", "fast")}
    check_agreement(observed, TINY, CPU)
    assert tolerance("fast", TINY, CPU) == 1e-4
    wrong = dict(observed["fast"].given, invariance=observed["fast"].given["invariance"] * 1.001)
    with pytest.raises(TrainingError, match=r"variant fast: invariance is .* allowed 1e-04"):
        check_agreement(observed | {"fast": Observed(wrong, observed["fast"].attacked)}, TINY, CPU)
    # An attack that does not move: the loss of the clean images.
    lazy = dict(observed["fast"].attacked, ce_adv=0.9 * observed["eager"].attacked["ce_adv"])
    with pytest.raises(TrainingError, match="ce_adv, attacked"):
        check_agreement(observed | {"fast": Observed(observed["fast"].given, lazy)}, TINY, CPU)


def test_strong_baseline_freezes_parameters_in_its_attack_and_keeps_its_graphs() -> None:
    counted: list[bool] = []
    torch.manual_seed(0)
    from arat_fast import reference

    method = reference.ARAT(reference.resnet8())
    strong = StrongIteration(method, attack_of(TINY, "strong"), None, compiled=False)
    strong.frozen = list(method.network.parameters())  # as when it is compiled
    strong.forward = lambda x: (counted.append(method.network.conv1.weight.requires_grad), method.network(x))[
        1
    ]
    images, labels = data(TINY, CPU)
    strong(images, labels)
    assert counted == [False, True, True]  # one attack step, then both kinds of images
    assert all(p.requires_grad and p.grad is not None for p in method.network.parameters())


def test_settings_depend_on_the_device_unless_given() -> None:
    setting, turns, jobs = settled(StepOptions(), CPU)
    assert (setting.batch, turns, jobs) == (16, 5, 1)
    setting, turns, jobs = settled(StepOptions(batch=7, repeats=2), torch.device("cuda"))
    assert (setting.batch, turns, jobs) == (7, 2, 4)
    for wrong in ({"batch": -1}, {"batch": 1}, {"side": 4}, {"steps": 0}, {"threads": -2}):
        with pytest.raises(UserError, match="--"):
            settled(StepOptions(**wrong), CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--prepare needs --caches and --json"):
        step.main(["--prepare", "--device", "cpu"])


def test_a_start_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = start_of(TINY, "fast", CPU, 1, tmp_path)
    assert found.compile_seconds is None
    assert found.first_iteration_seconds > 0
    assert 100 << 20 < found.peak_memory_bytes < 8 << 30


def test_compiled_starts_run_twice_and_leave_their_caches(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[str, int]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        variant, given = command[-2:]
        seen.append((variant, json.loads(given)["setting"]["steps"]))
        cache = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        cold = not cache.exists()
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "graph").write_text(variant)
        words = json.dumps(
            {"first_seconds": 30.0 if cold else 5.0, "steady_seconds": 2.0, "peak_memory_bytes": 7}
        )
        return subprocess.CompletedProcess(command, 0, f"a warning\n{words}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    setting = Setting("resnet8", 4, 8, 10, "fp32", "on")
    found = starts(setting, ["eager", "fast"], CPU, 1, tmp_path)
    assert seen == [("eager", 2), ("fast", 2), ("fast", 2)]
    assert found["fast"] == Start(30.0, 28.0, 3.0, 7)
    assert found["eager"].compile_seconds is None
    assert (tmp_path / "all" / "torchinductor_cache_dir" / "graph").exists()


def test_a_variant_that_fails_alone_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nKeyError: 'no-such-model'\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(TrainingError, match="variant eager failed alone: KeyError: 'no-such-model'"):
        start_of(TINY, "eager", CPU, 1, tmp_path)


def test_attack_bench_checks_ball_and_strength(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "attack.json"
    arguments = "--device cpu --model resnet8 --batch 8 --side 8 --steps 2 --repeats 2 --compile off"
    assert attack.main([*arguments.split(), "--precision", "fp32", "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert {"eager", "ours", "ours-plain", "fast-folded", "eager-batch", "ours-batch", "fast-batch"} <= set(
        record["variants"]
    )
    for figures in record["variants"].values():
        assert figures["ms_per_step"] > 0
        assert figures["loss_reached"] > 0
    assert "ms/step" in capsys.readouterr().out


def test_an_attack_that_leaves_the_ball_or_does_not_attack_is_refused() -> None:
    setting = Setting("resnet8", 8, 8, 2, "fp32", "off")
    images, labels = data(setting, CPU)
    both = networks(setting, CPU, images)
    eager = build_attack(setting, CPU, "eager", both)
    check_attacks({"eager": eager}, {"eager": both}, images, labels)
    with pytest.raises(TrainingError, match="leaves the ball"):
        check_attacks({"eager": lambda x, y: (x + 0.04).clamp(0, 1)}, {"eager": both}, images, labels)
    with pytest.raises(TrainingError, match="reaches the loss"):
        check_attacks({"eager": eager, "ours": lambda x, y: x}, {"eager": both}, images, labels)
