"""The benchmark suite's results: the record, where it is committed, and how it differs from the last one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from arat_fast.benchmarks.ceilings import Ceilings
from arat_fast.benchmarks.conditions import conditions

RESULTS = Path(__file__).resolve().parent / "results"


def device_slug(device: torch.device) -> str:
    """cpu, or the GPU's name as a file name."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def committed_file(device: torch.device) -> Path:
    """Where this kind of device's results are committed."""
    return RESULTS / f"suite_{device_slug(device)}.json"


def suite_record(
    device: torch.device, ceilings: Ceilings | None, cases: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is written: conditions and cases."""
    return {"benchmark": "suite", "conditions": conditions(device, ceilings), "cases": dict(cases)}


def _percent(case: Mapping[str, Any]) -> str:
    shares = [("mfu", "MFU"), ("bandwidth_share", "of copy")]
    return "".join(f", {100 * case[key]:.0f} % {name}" for key, name in shares if key in case)


def compared(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines for people: a case's time, then ours against every other variant, now and then."""
    old = before["cases"] if before is not None else {}
    for name, case in record["cases"].items():
        own = case["variants"][case["ours"]]
        low, high = own["spread"]
        yield f"{name}: {case['ours']} {_time(own['seconds'])} ({_time(low)} - {_time(high)}){_percent(case)}"
        known = old.get(name, {}).get("variants", {})
        for other, figures in case["variants"].items():
            if other == case["ours"]:
                continue
            low, high = figures["ratio_spread"]
            line = f"    {figures['ours_is_faster_by']:6.2f} x {other} ({low:.2f} - {high:.2f})"
            if other in known:
                line += f", committed {known[other]['ours_is_faster_by']:.2f} x" + _verdict(
                    figures, known[other]
                )
            yield line
    if before is None:
        yield "nothing committed yet for this device: --commit-results keeps this run"
    else:
        given = before["conditions"]
        load = given["load_average"][0]
        yield f"committed: {given['date'][:10]}, revision {given['revision']}, load {load}"


def _verdict(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Whether the spreads of two runs' ratios part."""
    (low, high), (old_low, old_high) = now["ratio_spread"], before["ratio_spread"]
    return ": faster" if low > old_high else ": SLOWER" if high < old_low else ""


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
