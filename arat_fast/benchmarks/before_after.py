"""An old and a new way of doing the same, timed in turns: what the examples print with `--measure`."""

from __future__ import annotations

from statistics import median

import torch

from arat_fast.benchmarks.timing import Call, ratio, take_turns


def before_after(before: Call, after: Call, images: int, device: torch.device, repeats: int = 9) -> str:
    """Images/s of each, medians of `repeats` turns after one to warm up, and how many times faster.

    Args:
        before, after: one iteration each.
        images: of an iteration.
        device: that they run on.
        repeats: turns.

    Returns:
        three lines of text; the ratio with the least and the most of a turn.
    """
    before()
    after()
    seconds = take_turns({"before": before, "after": after}, device, repeats)
    lines = [f"{name:8}{images / median(values):.1f} images/s" for name, values in seconds.items()]
    middle, (least, most) = ratio(seconds["before"], seconds["after"])
    return "\n".join([*lines, f"ratio   {middle:.2f} ({least:.2f} to {most:.2f}), {repeats} turns, {device}"])
