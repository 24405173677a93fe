"""The benchmark suite's fixture: a case's variants are checked, then take turns; ratios are compared.

`compare(name, variants, check=...)` times "ours", the first variant, by pytest-benchmark; before each of its
rounds every other variant runs once, so that all see the same machine. What was measured goes to
bench/out/suite.json at the end, beside the last committed result of the same kind of device.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_results import committed_file, compared, suite_record

from arat_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from arat_fast.benchmarks.timing import ratio, seconds_of, synchronise
from arat_fast.evaluation.record import write_json

HERE = Path(__file__).resolve().parent
OUT = HERE / "out" / "suite.json"
Compare = Callable[..., None]
CASES = pytest.StashKey[dict[str, Any]]()
CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--commit-results", action="store_true", help="copy the results to bench/results/")
    parser.addoption("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to measure")
    parser.addoption(
        "--rounds", type=int, default=0, help="turns of each variant; 0: 15 on a GPU, 5 on a CPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES] = {}


def chosen_device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where to measure: a GPU where there is one."""
    torch.backends.cudnn.benchmark = True
    return chosen_device(pytestconfig)


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config, device: torch.device) -> Ceilings:
    """What this device can do at most, measured once."""
    pytestconfig.stash[CEILINGS] = measure_ceilings(device)
    return pytestconfig.stash[CEILINGS]


@pytest.fixture
def compare(
    benchmark: Any,
    device: torch.device,
    ceilings: Ceilings,
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
) -> Compare:
    """Time a case; see the module's documentation."""
    rounds = pytestconfig.getoption("--rounds") or (15 if device.type == "cuda" else 5)

    def run(
        name: str,
        variants: Mapping[str, Callable[[], object]],
        *,
        check: Callable[[], object],
        floors: Mapping[str, float] | None = None,
        calls: int = 1,
        **more: object,
    ) -> None:
        """calls: of a variant in one call. floors: "flop" and "bytes" of one. more: the case's conditions."""
        check()
        ours, *others = variants
        for call in variants.values():
            call()
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}

        def take_other_turns() -> None:
            for other in others:
                seconds[other].append(seconds_of(variants[other], device) / calls)
            synchronise(device)

        def take_turn() -> None:
            seconds[ours].append(seconds_of(variants[ours], device) / calls)

        benchmark.group = request.path.stem.removeprefix("test_")
        benchmark.pedantic(take_turn, setup=take_other_turns, rounds=rounds, iterations=1)
        found = _case(seconds, ours, floors or {}, ceilings) | {"calls": calls, "conditions": more}
        benchmark.extra_info.update(found, device=str(device), load=round(os.getloadavg()[0], 2))
        pytestconfig.stash[CASES][name] = found

    return run


def _case(
    seconds: Mapping[str, list[float]], ours: str, floors: Mapping[str, float], ceilings: Ceilings
) -> dict[str, Any]:
    middle = statistics.median(seconds[ours])
    found: dict[str, Any] = {"ours": ours, "variants": {}}
    for name, values in seconds.items():
        times, spread = ratio(values, seconds[ours])
        found["variants"][name] = {
            "seconds": statistics.median(values),
            "spread": [min(values), max(values)],
            "ours_is_faster_by": times,
            "ratio_spread": spread,
        }
    if "flop" in floors:
        peak = ceilings.bf16_flop_per_second or ceilings.fp32_flop_per_second
        found["mfu"] = floors["flop"] / middle / peak
    if "bytes" in floors:
        found["bandwidth_share"] = floors["bytes"] / middle / ceilings.copy_bytes_per_second
    return found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cases = config.stash[CASES]
    if not cases:
        return
    where = chosen_device(config)
    record = suite_record(where, config.stash.get(CEILINGS, None), cases)
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, record)
    last = committed_file(where)
    before = json.loads(last.read_text()) if last.exists() else None
    terminalreporter.section("ours against the others, and the last committed result")
    for line in compared(record, before):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written: {OUT.relative_to(HERE.parent)}")
    if config.getoption("--commit-results"):
        shutil.copyfile(OUT, last)
        terminalreporter.write_line(f"copied to {last.relative_to(HERE.parent)}: commit it")
