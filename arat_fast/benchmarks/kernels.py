"""How fast each kernel is on this GPU, against a device-to-device copy, eager PyTorch and Inductor.

    arat-fast bench kernels [--compile-only] [--device cpu] [--budget SECONDS] [--json FILE] [--plots FOLDER]

Each variant runs as the trainer runs it, from a captured CUDA graph, on a ring of inputs and outputs larger
than the L2 cache. Variants are timed in turn (A B C A B C ...), reported by median and interquartile range;
the copy moves as many bytes as the kernel must. All are checked against eager PyTorch before they are timed.

With `--device cpu` the kernels' twins in plain PyTorch are timed, uncompiled and on small shapes: what a
trainer on a CPU calls.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arat_fast.benchmarks.ceilings import measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.timing import take_turns
from arat_fast.environment import cpu_name
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.training.capture import CudaGraph

from .cases import BenchmarkCase, all_cases
from .compile_only import run_in_own_process

REPEATS = 15
RING_BYTES = 8 << 30  # at most, of one case's inputs
CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Timing:
    """One variant of one case: median and interquartile range of a call's time on the device."""

    kernel: str
    shape: str
    variant: str
    microseconds: float
    spread_microseconds: float
    repeats: int
    bytes_moved: int

    @property
    def gigabytes_per_second(self) -> float:
        """Of the bytes that must move."""
        return self.bytes_moved / self.microseconds / 1e3


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Replays `call` as a CUDA graph, captured after two calls on a side stream.

    Holds on to `call`: the graph reads the memory of its tensors.
    """
    graph = CudaGraph()
    with graph.side_stream():
        for _ in range(2):
            call()
    # Kept until the capture ends: every call writes memory of its own, and none stays in the cache.
    kept: list[object] = []
    graph.record(lambda: kept.append(call()))
    return functools.partial(_replay, graph, call)


def _replay(graph: CudaGraph, _call: object) -> None:
    graph.replay()


def ring_of_calls(case: BenchmarkCase) -> tuple[dict[str, Callable[[], object]], int]:
    """(calls by variant and "copy", how many times each calls its variant), shown to agree and warmed up.

    A call goes round a ring of inputs; on a GPU it replays a captured graph. Raises AssertionError for a
    variant that returns something else than "eager".
    """
    torch.compiler.reset()  # cases share code, and Dynamo compiles one code object eight times at most
    first = case.make(0)
    on_gpu = first[0].is_cuda
    variants = dict(case.variants)
    if not on_gpu:
        variants = {name: variants[name] for name in ("ours", "eager")}
    replace(case, variants=variants).check()
    cache = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else CPU_CACHE
    size = sum(tensor.numel() * tensor.itemsize for tensor in first)
    # Four caches' worth, so that no call finds its inputs in L2; at least eight calls a replay.
    count = max(2, min(max(8, 4 * cache // max(1, case.bytes_moved)), RING_BYTES // max(1, size)))
    count = count if on_gpu else min(count, 8)
    ring = [first, *(case.make(seed) for seed in range(1, count))]
    half = case.bytes_moved // 2
    copies = [
        torch.empty((2, half), dtype=torch.uint8, device=first[0].device).random_() for _ in range(count)
    ]

    def over_the_ring(variant: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: [variant(*inputs) for inputs in ring]

    def copy() -> None:
        for pair in copies:
            pair[0].copy_(pair[1])

    calls = {name: over_the_ring(variant) for name, variant in variants.items()} | {"copy": copy}
    if on_gpu:
        calls = {name: captured(call) for name, call in calls.items()}
    for call in calls.values():
        call()
    return calls, count


def measure(case: BenchmarkCase, repeats: int = REPEATS) -> list[Timing]:
    """Check and time a case's variants and a copy of as many bytes."""
    calls, count = ring_of_calls(case)
    device = case.make(0)[0].device
    results = []
    # Five replays in a row on a GPU: the launch of the first is on the host's clock.
    replays = 5 if device.type == "cuda" else 1
    for name, seconds in take_turns(calls, device, repeats, replays).items():
        each = [1e6 * value / count for value in seconds]
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        middle = statistics.median(each)
        moved = case.bytes_moved
        results.append(Timing(case.kernel, case.shape, name, middle, high - low, repeats, moved))
    return results


def table(results: Sequence[Timing]) -> str:
    """A line a case: each variant's time, and ours as a share of copy bandwidth and against the others."""
    by_case: dict[tuple[str, str], dict[str, Timing]] = {}
    for result in results:
        by_case.setdefault((result.kernel, result.shape), {})[result.variant] = result
    lines = []
    for (kernel, shape), variants in by_case.items():
        ours, copy = variants["ours"], variants["copy"]
        others = ", ".join(
            f"{name} {timing.microseconds:.1f} us ({timing.microseconds / ours.microseconds:.2f}x)"
            for name, timing in variants.items()
            if name not in ("ours", "copy")
        )
        lines.append(
            f"{kernel}, {shape}: {ours.microseconds:.1f} us +- {ours.spread_microseconds:.1f}, "
            f"{ours.gigabytes_per_second:.0f} GB/s, "
            f"{100 * copy.microseconds / ours.microseconds:.0f} % of copy; {others}"
        )
    return "\n".join(lines)


def run(
    compile_only: bool = False,
    json_file: Path | None = None,
    budget: float | None = None,
    device: str = "auto",
    plots: Path | None = None,
) -> int:
    """The benchmark, or with `compile_only` the check that needs no GPU; returns the exit status.

    After `budget` seconds no further case is begun, and how many were left out is said.

    1 when a variant is wrong or a kernel does not compile, spills or loads narrowly; 2 when there is no GPU
    and the CPU was not asked for.
    """
    check_writable(json_file)
    if compile_only:
        return run_in_own_process(json_file)
    if device != "cpu" and not torch.cuda.is_available():
        print(
            "kernel timings need a GPU and there is none here; --compile-only needs none, and --device cpu "
            "times what stands in for the kernels",
            file=sys.stderr,
        )
        return 2
    where = torch.device("cpu" if device == "cpu" else "cuda")
    record, wrong, left_out = measure_all(where, budget)
    if json_file is not None:
        write_json(json_file, record)
    if plots is not None:
        from arat_fast.benchmarks.plots import draw

        draw([record], plots)
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    name = torch.cuda.get_device_name() if where.type == "cuda" else cpu_name()
    print(
        f"{len(record['results'])} timings on {name}, {len(wrong)} cases wrong, {left_out} left out for lack "
        "of time"
    )
    return 1 if wrong else 0


def measure_all(
    device: torch.device, budget: float | None = None, repeats: int = REPEATS
) -> tuple[dict[str, Any], list[str], int]:
    """(the record, what is wrong, how many cases were left out); prints a line a case as it goes."""
    results: list[Timing] = []
    wrong = []
    left_out = 0
    begun = time.monotonic()
    ceilings = measure_ceilings(device)  # first: a case that fails may take the device with it
    for case in all_cases(device):
        if budget is not None and time.monotonic() - begun > budget:
            left_out += 1
            continue
        try:
            results += (timed := measure(case, repeats))
            print(table(timed), flush=True)
        except Exception as error:  # a wrong or failing case must not hide the others
            wrong.append(" ".join(str(error).split()))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    given = conditions(device, ceilings, repeats=repeats)
    rows = [asdict(result) for result in results]
    return {"benchmark": "kernels", "conditions": given, "results": rows}, wrong, left_out


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="arat-fast bench kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compile-only", action="store_true", help="no GPU: registers, spills, load widths")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the results (needs matplotlib)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after this time")
    options = parser.parse_args(list(arguments))
    return run(options.compile_only, options.json, options.budget, options.device, options.plots)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
