"""Compile every kernel for every supported GPU, without one: registers, spills, shared memory, load width.

    python -m arat_fast.benchmarks.compile_only [--target NAME ...] [--json FILE]

Exit status 1 when a kernel fails to compile, spills, reads a stream narrower than its case demands, or
divides with a branch where its case forbids it.
Triton's driver is replaced for the whole process, so this is a process of its own and never one that
interprets.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.kernels.compile_cases import ALL_TARGETS, CompileCase, all_cases

MOST_JOBS = 8
ELEMENT_BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs of a GPU. `spills`: bytes (NVIDIA) or registers (AMD) spilled."""

    kernel: str
    specialisation: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int | None


class NoDriver:
    """Stands in for Triton's driver: names a target, has no device."""

    def __init__(self, name: str) -> None:
        cuda = name.startswith("sm_")
        self.target = GPUTarget("cuda", int(name[3:]), 32) if cuda else GPUTarget("hip", name, 64)
        self.device = ALL_TARGETS.index(name)  # Triton's cache of compiled kernels is keyed by it

    def get_current_target(self) -> GPUTarget:
        """The architecture that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """A number that differs from target to target."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0


def stream_bytes(ttgir: str, threads: int) -> int:
    """Bytes that a thread reads of streams: of tensors that give every thread at least 16 bytes.

    Smaller ones (a scalar, a channel's statistics, partial sums) cannot be read 16 bytes at a time.
    """
    total = 0
    for line in ttgir.splitlines():
        if "tt.load" in line or "amdg.buffer_load" in line or "async_copy_global_to_local" in line:
            match = re.search(r": tensor<([\dx]+)x(?:!tt\.ptr<)?(\w+)", line)
            if match:
                each = prod(int(side) for side in match[1].split("x")) * ELEMENT_BYTES[match[2]] // threads
                total += each if each >= 16 else 0
    return total


def nvidia_loads(ptx: str) -> Counter[int]:
    """How many global loads there are of each width in bytes."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x[\da-f]+|\d+)", ptx):
        widths[int(size, 0)] += 1
    return widths


def amd_loads(assembly: str) -> Counter[int]:
    """How many vector loads from global memory there are of each width in bytes."""
    names = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2}
    widths: Counter[int] = Counter()
    for name in re.findall(r"\b(?:global|buffer|flat)_load_(\w+?)(?:_d16(?:_hi)?)?\s", assembly):
        widths[names.get(name, 1)] += 1
    return widths


def load_width(loads: Counter[int], streamed: int) -> int | None:
    """16 when the 16-byte loads cover the streams; else the narrowest load; None without a load."""
    if not streamed:
        return min(loads, default=None)
    return 16 if 16 * loads[16] >= streamed else min(loads)


def _nvidia(compiled: Any) -> tuple[int, int, int | None]:
    """Of the machine code itself. Its stack is what spills: no kernel of ours has a local array."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    streamed = stream_bytes(compiled.asm["ttgir"], 32 * compiled.metadata.num_warps)
    width = load_width(nvidia_loads(compiled.asm["ptx"]), streamed)
    return int(found[1]), int(found[2]) + int(found[3]), width


def _amd(compiled: Any) -> tuple[int, int, int | None]:
    assembly = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    spills = count("vgpr_spill_count") + count("sgpr_spill_count")
    streamed = stream_bytes(compiled.asm["ttgir"], 64 * compiled.metadata.num_warps)
    return count("vgpr_count"), spills, load_width(amd_loads(assembly), streamed)


def compile_case(case: CompileCase, target: str) -> Iterator[Compiled]:
    """Compile one case for one target; an autotuner gives a result a configuration."""
    triton.runtime.driver.set_active(NoDriver(target))
    kernels = case.kernel.warmup(*case.args, grid=(1,), **case.meta)
    for compiled in kernels if isinstance(kernels, list) else [kernels]:
        slow = re.search(r"\b(?:div|sqrt|rcp)\.rn\.f32", compiled.asm.get("ptx", ""))
        if slow and case.branchless:
            raise ValueError(f"{slow[0]} branches to a slow path; no load is moved across it")
        registers, spills, width = (_nvidia if target.startswith("sm_") else _amd)(compiled)
        yield Compiled(
            case.name, case.specialisation, target, registers, spills, compiled.metadata.shared, width
        )


def last_line(error: Exception) -> str:
    """What went wrong, without the kernel's source, which Triton puts first."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1]


def line(result: Compiled) -> str:
    """A result in one line."""
    return (
        f"{result.target:7} {result.kernel:28} {result.registers:3} registers {result.spills:3} spills "
        f"{result.shared_bytes:6} shared {result.load_bytes or '-':>2} B loads  {result.specialisation}"
    )


def _compile_part(task: tuple[int, int, Sequence[str]]) -> tuple[list[Compiled], list[str]]:
    """Every so many-th case; prints a line a kernel. (What they need, what is wrong)"""
    part, parts, targets = task
    results: list[Compiled] = []
    problems: list[str] = []
    for case in islice(all_cases(), part, None, parts):
        for target in case.targets:
            if target not in targets:
                continue
            name = f"{target} {case.name} ({case.specialisation})"
            try:
                compiled = list(compile_case(case, target))
            except Exception as error:  # one kernel's failure must not hide the others'
                problems.append(f"{name} does not compile: {last_line(error)}")
                continue
            results += compiled
            for result in compiled:
                print(line(result), flush=True)
                if result.spills:
                    problems.append(f"{name} spills {result.spills}")
                if case.load_bytes is not None and (result.load_bytes or 0) < case.load_bytes:
                    problems.append(
                        f"{name} loads {result.load_bytes} bytes at a time, not {case.load_bytes}"
                    )
    return results, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a compiled kernel, write JSON where asked, return the exit status."""
    parser = argparse.ArgumentParser(prog="arat_fast.benchmarks.compile_only", description=__doc__)
    parser.add_argument(
        "--target",
        action="append",
        choices=ALL_TARGETS,
        help="compile for this architecture only; may be repeated (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a JSON list")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: a core each, 8 at most)")
    options = parser.parse_args(arguments)
    check_writable(options.json)
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing can be compiled; unset it")

    results: list[Compiled] = []
    problems: list[str] = []
    parts = max(1, options.jobs or min(MOST_JOBS, os.cpu_count() or 1))
    tasks = [(part, parts, options.target or ALL_TARGETS) for part in range(parts)]
    with ProcessPoolExecutor(parts, multiprocessing.get_context("fork")) as pool:
        for compiled, failed in pool.map(_compile_part, tasks):
            results += compiled
            problems += failed
    if options.json is not None:
        write_json(options.json, [asdict(result) for result in results])
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(
        f"{len(results)} kernels compiled for {len({r.target for r in results})} targets with "
        f"Triton {triton.__version__}; {len(problems)} problems"
    )
    return 1 if problems else 0


def run_in_own_process(json_file: Path | None = None) -> int:
    """`main` in a process of its own in which Triton does not interpret; returns its exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "arat_fast.benchmarks.compile_only"]
    command += ["--json", str(json_file)] if json_file is not None else []
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
