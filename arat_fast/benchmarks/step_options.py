"""The flags of `arat-fast bench step`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from arat_fast.benchmarks.step_variants import Setting, Switch
from arat_fast.errors import UserError
from arat_fast.training.precision import Precision


@dataclass(frozen=True)
class StepOptions:
    """Measure a whole ARAT iteration against the eager reference, in images/s."""

    model: str = "resnet18"
    """Network: resnet8, resnet18, wrn-34-10."""
    batch: int = 0
    """Images a batch; 0: 128 on a GPU, 16 on a CPU."""
    side: int = 32
    """Side of the images in pixels."""
    steps: int = 10
    """Steps of the attack."""
    variants: str = ""
    """Comma-separated names; default: all that differ here."""
    precision: Precision = "auto"
    """Of the fast variants, and whether the strong ones may use bf16."""
    compile: Switch = "auto"
    """Compile; auto: as the trainer does, on a GPU or a CPU with bf16 matrix units."""
    repeats: int = 0
    """Timed turns of each variant; the median counts. 0: 15 on a GPU, 5 on a CPU."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    memory: bool = True
    """Measure each variant's peak memory and first iteration, in processes of its own."""
    jobs: int = 0
    """How many of those processes at a time; 0: 4 on a GPU, where compiling takes the time, else 1."""
    profile: bool = True
    """Profile eager and fast: where the time goes."""
    budget: float = 0.0
    """Seconds after which no further variant is built or profiled, the last of the list first; 0: no end."""
    prepare: bool = False
    """Only measure peak memory and first iterations into --json, and stop."""
    prepared: Path | None = None
    """Take peak memory and first iterations from this file, which --prepare wrote."""
    caches: Path | None = None
    """Keep what is compiled in this folder; default: a temporary one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""
    plots: Path | None = None
    """Draw the figures into this folder (needs matplotlib)."""


def settled(options: StepOptions, device: torch.device) -> tuple[Setting, int, int]:
    """(setting, turns, jobs), with what depends on the device filled in. Raises UserError."""
    on_gpu = device.type == "cuda"
    for name in ("batch", "repeats", "threads", "jobs"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}; expected 0 or more")
    batch = options.batch or (128 if on_gpu else 16)
    if batch < 2 or options.steps < 1 or options.side < 8:
        raise UserError("--batch must be at least 2, --steps at least 1 and --side at least 8")
    setting = Setting(options.model, batch, options.side, options.steps, options.precision, options.compile)
    return setting, options.repeats or (15 if on_gpu else 5), options.jobs or (4 if on_gpu else 1)
