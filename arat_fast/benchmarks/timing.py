"""Time calls that take turns: A B C A B C ..., so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device, count: int = 1) -> float:
    """Seconds a call, of `count` calls in a row: by the device's own clock on a GPU, which has been idle
    before.
    """
    synchronise(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def take_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    repeats: int,
    count: int = 1,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Seconds a call, one figure a turn, `repeats` turns each; fewer, but 3 at least, once `enough` says so.

    Warming up is the caller's business.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        if turn >= 3 and enough():
            break
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, count))
    return seconds


def ratio(baseline: Sequence[float], own: Sequence[float]) -> tuple[float, list[float]]:
    """How many times faster than the baseline: (median over the turns, [least, most]).

    Turn is divided by turn: what slowed both of a pair cancels.
    """
    each = [b / o for b, o in zip(baseline, own, strict=True)]
    return statistics.median(each), [min(each), max(each)]
