"""How fast each kernel is on this GPU, against a device-to-device copy, eager PyTorch and Inductor.

    python -m arat_fast.benchmarks.kernels [--compile-only] [--budget SECONDS] [--json FILE]

Each variant runs as the trainer runs it, from a captured CUDA graph, on a ring of inputs and outputs larger
than the L2 cache. Variants are timed in turn (A B C A B C ...), reported by median and interquartile range;
the copy moves as many bytes as the kernel must. All are checked against eager PyTorch before they are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from arat_fast.environment import environment

from .cases import BenchmarkCase, all_cases
from .compile_only import run_in_own_process

REPEATS = 15
RING_BYTES = 8 << 30  # at most, of one case's inputs


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


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`call` as a CUDA graph, after two warm-up calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the capture ends: every call writes memory of its own, and none stays in the cache.
        kept = call()
    del kept
    return graph


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each replay, the graphs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def measure(case: BenchmarkCase) -> list[Timing]:
    """Check and time a case's variants and a copy of as many bytes."""
    torch.compiler.reset()  # cases share code, and Dynamo compiles one code object eight times at most
    case.check()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    first = case.make(0)
    size = sum(tensor.numel() * tensor.itemsize for tensor in first)
    # Four caches' worth, so that no call finds its inputs in L2; at least eight calls a replay.
    count = max(2, min(max(8, 4 * cache // max(1, case.bytes_moved)), RING_BYTES // max(1, size)))
    ring = [first, *(case.make(seed) for seed in range(1, count))]
    half = case.bytes_moved // 2
    copies = [torch.empty((2, half), dtype=torch.uint8, device="cuda").random_() for _ in range(count)]

    def over_the_ring(variant: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [variant(*inputs) for inputs in ring]

    def copy() -> None:
        for pair in copies:
            pair[0].copy_(pair[1])

    graphs = {name: captured(over_the_ring(variant)) for name, variant in case.variants.items()}
    graphs["copy"] = captured(copy)
    results = []
    for name, times in interleaved(graphs, REPEATS).items():
        each = [1e3 * time / count for time in times]
        low, _, high = statistics.quantiles(each, n=4)
        results.append(
            Timing(
                case.kernel,
                case.shape,
                name,
                statistics.median(each),
                high - low,
                REPEATS,
                case.bytes_moved,
            )
        )
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


def run(compile_only: bool = False, json_file: Path | None = None, budget: float | None = None) -> int:
    """The benchmark, or with `compile_only` the check that needs no GPU; returns the exit status.

    After `budget` seconds no further case is begun, and how many were left out is said.

    1 when a variant is wrong or a kernel does not compile, spills or loads narrowly; 2 when there is no GPU.
    """
    if compile_only:
        return run_in_own_process(json_file)
    if not torch.cuda.is_available():
        print("kernel timings need a GPU and there is none here; --compile-only needs none", file=sys.stderr)
        return 2
    results: list[Timing] = []
    wrong = []
    left_out = 0
    begun = time.monotonic()
    for case in all_cases(torch.device("cuda")):
        if budget is not None and time.monotonic() - begun > budget:
            left_out += 1
            continue
        try:
            results += (timed := measure(case))
            print(table(timed), flush=True)
        except Exception as error:  # a wrong or failing case must not hide the others
            wrong.append(" ".join(str(error).split()))
        torch.cuda.empty_cache()
    if json_file is not None:
        conditions = environment(torch.device("cuda")) | {"date": datetime.now(UTC).isoformat("T", "seconds")}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"conditions": conditions, "results": [asdict(result) for result in results]}
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    print(
        f"{len(results)} timings on {torch.cuda.get_device_name()}, {len(wrong)} cases wrong, "
        f"{left_out} left out for lack of time"
    )
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m arat_fast.benchmarks.kernels`."""
    parser = argparse.ArgumentParser(prog="arat_fast.benchmarks.kernels", description=__doc__)
    parser.add_argument("--compile-only", action="store_true", help="no GPU: registers, spills, load widths")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after this time")
    options = parser.parse_args(arguments)
    return run(options.compile_only, options.json, options.budget)


if __name__ == "__main__":
    sys.exit(main())
