"""The measurement of `arat-fast bench step`: variants built, shown to agree, timed in turns, profiled."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arat_fast.benchmarks.alone import Start, starts, use_caches
from arat_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.floors import Floors, iteration_floors
from arat_fast.benchmarks.profiling import Profile, profile_or_none
from arat_fast.benchmarks.step_options import StepOptions, settled
from arat_fast.benchmarks.step_variants import (
    Iteration,
    Observed,
    Setting,
    baseline,
    build,
    check_agreement,
    data,
    element_bytes,
    observe,
    variant_names,
)
from arat_fast.benchmarks.timing import ratio, take_turns
from arat_fast.errors import UserError
from arat_fast.training.build import check_model, pick_device, use_threads
from arat_fast.training.precision import resolve_precision


class Clock:
    """Seconds since the benchmark began, against its budget."""

    def __init__(self, budget: float) -> None:
        self.begun, self.budget = time.perf_counter(), budget

    def over(self, share: float = 1.0) -> bool:
        """Whether `share` of the budget is spent."""
        return bool(self.budget) and time.perf_counter() - self.begun > share * self.budget


def _built(
    names: Sequence[str], setting: Setting, device: torch.device, clock: Clock
) -> dict[str, Iteration]:
    """The variants that the budget allows, compiled and captured, all in agreement."""
    images, labels = data(setting, device)
    variants: dict[str, Iteration] = {}
    observed: dict[str, Observed] = {}
    for name in names:
        if clock.over(0.6) and baseline(name) in variants:
            continue
        variants[name] = build(setting, device, name)
        observed[name] = observe(variants[name], images, labels)
    check_agreement(observed, setting, device)
    return variants


def prepare(options: StepOptions, caches: Path) -> dict[str, Any]:
    """The record of the variants' starts, each in processes of its own; they leave their caches behind."""
    check_model(options.model)
    device = pick_device(options.device)
    setting, _, jobs = settled(options, device)
    names = variant_names(setting, device, options.variants)
    found = starts(setting, names, device, options.threads, caches, jobs)
    return {
        "benchmark": "step starts",
        "conditions": conditions(device, None, **asdict(setting), jobs=jobs),
        "variants": {name: asdict(start) for name, start in found.items()},
    }


def _prepared(file: Path) -> dict[str, Any]:
    try:
        variants = json.loads(file.read_text())["variants"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--prepared {file}: {error}; give what --prepare wrote into --json") from None
    return dict(variants)


def measure(options: StepOptions) -> dict[str, Any]:
    """The record: `conditions`, and `variants` by name. Raises TrainingError when variants disagree."""
    with contextlib.ExitStack() as stack:
        caches = options.caches or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begun: dict[str, Any] = {}
        if options.prepared is not None:
            begun = _prepared(options.prepared)
        elif options.memory:
            begun = prepare(options, caches)["variants"]
        use_caches(caches / "all")
        return _measure(options, {name: Start(**start) for name, start in begun.items()})


def _measure(options: StepOptions, begun: dict[str, Start]) -> dict[str, Any]:
    check_model(options.model)
    device = pick_device(options.device)
    setting, turns, jobs = settled(options, device)
    use_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    clock = Clock(options.budget)
    names = variant_names(setting, device, options.variants)
    variants = _built(names, setting, device, clock)
    images, labels = data(setting, device)
    before = measure_ceilings(device)
    calls = {name: _call(iterate, images, labels) for name, iterate in variants.items()}
    count = 4 if device.type == "cuda" else 1
    seconds = take_turns(calls, device, turns, count, enough=clock.over)
    wanted = _worth_profiling(variants, device) if options.profile else []
    profiles = {name: profile_or_none(calls[name], device) for name in wanted if not clock.over()}
    ceilings = measure_ceilings(device).best(before)
    record = {
        name: _figures(name, seconds, setting, device, ceilings, begun.get(name), profiles.get(name))
        | {"captured": bool(getattr(iterate, "captured", ()))}
        for name, iterate in variants.items()
    }
    floors = _floors("fast", setting, device)
    limits = floors.limits(
        ceilings.flop_per_second(resolve_precision(options.precision, device)),
        ceilings.copy_bytes_per_second,
    )
    given = asdict(setting) | {
        "attack_steps": setting.steps,
        "precision": resolve_precision(options.precision, device),
        "compile": setting.compiled(device),
        "repeats": len(seconds[names[0]]),
        "jobs": jobs,
        "flop_an_image": floors.flop,
        "bytes_an_image": floors.bytes,
        "floors_images_per_second": dict(zip(("arithmetic", "bytes", "in_turn"), limits, strict=True)),
        "left_out": [name for name in names if name not in variants],
    }
    return {
        "benchmark": "step",
        "conditions": conditions(device, ceilings, **given),
        "variants": record,
    }


def _call(iterate: Iteration, images: Tensor, labels: Tensor) -> Callable[[], object]:
    return lambda: iterate(images, labels)


def _worth_profiling(variants: dict[str, Iteration], device: torch.device) -> list[str]:
    if device.type == "cuda":
        return list(variants)
    return [name for name in ("eager", "fast", "fast-folded") if name in variants]


def _floors(name: str, setting: Setting, device: torch.device) -> Floors:
    element = element_bytes(name, setting, device)
    return iteration_floors(
        setting.model, setting.side, setting.steps, setting.batch, element, name == "fast-folded"
    )


def _figures(
    name: str,
    seconds: dict[str, list[float]],
    setting: Setting,
    device: torch.device,
    ceilings: Ceilings,
    start: Start | None,
    profile: Profile | None,
) -> dict[str, Any]:
    speeds = sorted(setting.batch / s for s in seconds[name])
    speed = statistics.median(speeds)
    times, ratio_spread = ratio(seconds[baseline(name)], seconds[name])
    floors = _floors(name, setting, device)
    peak = ceilings.flop_per_second(resolve_precision(setting.precision, device))
    begun = start or Start(float("nan"), None, None, 0)
    return {
        "images_per_second": speed,
        "spread": [speeds[0], speeds[-1]],
        "ratio": times,
        "ratio_spread": ratio_spread,
        "baseline": baseline(name),
        "mfu": speed * floors.flop / peak,
        "bandwidth_share": speed * floors.bytes / ceilings.copy_bytes_per_second,
        "peak_memory_bytes": begun.peak_memory_bytes if start else None,
        "first_iteration_seconds": begun.first_iteration_seconds if start else None,
        "compile_seconds": begun.compile_seconds,
        "compile_seconds_cached": begun.compile_seconds_cached,
        "host_gap_share": profile.idle_share if profile else None,
        "launches": profile.launches if profile else None,
        "profile": profile.fields() if profile else None,
    }
