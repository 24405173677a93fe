"""One variant of the step in a process of its own: peak memory, and what its first iteration takes.

Compiled variants run twice, with an empty Inductor cache and with the cache that the first run left. The
attack has two steps: more take longer, not more memory.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

import torch

from arat_fast.benchmarks.step_variants import Setting, build, data, is_compiled
from arat_fast.benchmarks.timing import synchronise
from arat_fast.errors import TrainingError
from arat_fast.training.build import pick_device, use_threads

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
STEADY = 3


@dataclass(frozen=True)
class Alone:
    """What one process saw. peak_memory_bytes: the GPU's allocations, else the process's resident set."""

    first_seconds: float
    steady_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Start:
    """One variant's start. compile_seconds: the first iteration's time less a steady one's, with empty
    caches; None where nothing is compiled.
    """

    first_iteration_seconds: float
    compile_seconds: float | None
    compile_seconds_cached: float | None
    peak_memory_bytes: int


def resident_peak() -> int:
    """Peak resident bytes of this process. Not getrusage's: that survives exec, so a child starts with its
    parent's peak.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def run_here(setting: Setting, variant: str, device: torch.device) -> Alone:
    """The variant's first iterations in this process."""
    torch.backends.cudnn.benchmark = True
    iterate = build(setting, device, variant)
    images, labels = data(setting, device)
    seconds = []
    for _ in range(1 + STEADY):
        synchronise(device)
        started = time.perf_counter()
        iterate(images, labels)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_peak()
    return Alone(seconds[0], statistics.median(seconds[1:]), peak)


def run_alone(setting: Setting, variant: str, device: str, threads: int, cache: Path) -> Alone:
    """`run_here` in a new process whose compilers cache in `cache`.

    Raises TrainingError with its last words where it fails.
    """
    given = json.dumps({"setting": asdict(setting), "device": device, "threads": threads})
    command = [sys.executable, "-m", "arat_fast.benchmarks.alone", variant, given]
    environment = os.environ | {name: str(cache / name.lower()) for name in CACHES}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        words = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise TrainingError(f"variant {variant} failed alone: {words[-1]}")
    return Alone(**json.loads(result.stdout.strip().splitlines()[-1]))


def start_of(setting: Setting, variant: str, device: torch.device, threads: int, cache: Path) -> Start:
    """One variant's start, by one process or two."""
    small = replace(setting, steps=min(2, setting.steps))
    first = run_alone(small, variant, device.type, threads, cache)
    if not is_compiled(variant, setting, device):
        return Start(first.first_seconds, None, None, first.peak_memory_bytes)
    again = run_alone(small, variant, device.type, threads, cache)
    return Start(
        first.first_seconds,
        first.first_seconds - first.steady_seconds,
        again.first_seconds - again.steady_seconds,
        # Of the cached start: compiling takes memory of its own.
        again.peak_memory_bytes,
    )


def starts(
    setting: Setting, variants: Sequence[str], device: torch.device, threads: int, caches: Path, jobs: int = 1
) -> dict[str, Start]:
    """Every variant's start, `jobs` at a time, each with caches of its own under `caches`.

    What each compiled is gathered in `caches/all`, for a process that runs all of them.
    """
    gathering = Lock()

    def start(variant: str) -> Start:
        found = start_of(setting, variant, device, threads, caches / variant)
        with gathering:
            if (caches / variant).is_dir():
                shutil.copytree(caches / variant, caches / "all", dirs_exist_ok=True)
        return found

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return dict(zip(variants, pool.map(start, variants), strict=True))


def use_caches(folder: Path) -> None:
    """Let this process's compilers look in `folder` first; call it before anything is compiled."""
    for name in CACHES:
        os.environ[name] = str(folder / name.lower())


def main(arguments: Sequence[str]) -> int:
    """The new process: prints what it saw as JSON."""
    variant, given = arguments
    options = json.loads(given)
    use_threads(options["threads"])
    alone = run_here(Setting(**options["setting"]), variant, pick_device(options["device"]))
    print(json.dumps(asdict(alone)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
