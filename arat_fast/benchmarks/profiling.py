"""Where an iteration's time goes: shares by kind of work, the largest entries, launches and host gaps.

On a GPU the kernels of a profiler's trace are sorted by name, as a replayed graph says no more of them; on a
CPU every operator's own time, by the operators that it runs under.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from arat_fast.benchmarks.timing import synchronise

# kind -> what its operators' or kernels' names hold, in the order in which they are asked; lower case.
KINDS: dict[str, tuple[str, ...]] = {
    "PGD": ("pgd", "random_start", "sign", "rand"),
    "augmentation": ("crop_flip",),
    "optimizer": ("optimizer.step", "sgd"),
    "foreach: casts, guard": ("multi_tensor",),
    "BatchNorm": (
        "batch_norm",
        "batchnorm",
        "split_bn",
        "bn_fw",
        "bn_bw",
        "welford",
        "statistics_partial",
        "statistics_combine",
        "apply_kernel",
        "small_forward",
        "small_backward",
        "reduce_partial",
        "reduce_combine",
        "input_gradient_kernel",
        "native_batch",
    ),
    "convolution": ("conv", "cudnn", "xmma", "implicit", "wgrad", "dgrad", "fprop", "nchwto", "nhwcto"),
    "classifier, losses": (
        "gemm",
        "nvjet",
        "cutlass",
        "addmm",
        "linear",
        "softmax",
        "nll",
        "cosine",
        "matmul",
    ),
    "compiled, mixed": ("triton_", "compiledfunction", "torch-compiled", "cpp_fused"),
}
log = logging.getLogger(__name__)
LAUNCHES = ("launchkernel", "graphlaunch", "memcpyasync", "memsetasync")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Profile:
    """One variant's time, an iteration.

    by_kind: shares of the busy time. top: the largest entries as (name, kind, share, calls an iteration).
    idle_share: of the wall time between the first kernel and the last, that in which none ran; None on a
    CPU, as is launches: kernel and graph launches, copies and fills.
    """

    busy_seconds: float
    by_kind: dict[str, float]
    top: list[tuple[str, str, float, float]]
    idle_share: float | None
    launches: float | None
    kernels: float | None

    def fields(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def kind_of(names: Iterable[str]) -> str:
    """The kind of the first of `names`, innermost first, that belongs to one; else "other"."""
    for name in names:
        # Neither a sign nor a random number; what Inductor fused is named after all that it may hold.
        low = name.lower().replace("unsigned", "").replace("operand", "")
        if low.startswith("triton_"):
            return "compiled, mixed"
        for kind, words in KINDS.items():
            if any(word in low for word in words):
                return kind
    return "other"


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def summed(entries: Iterable[tuple[str, str, float]], iterations: int, top: int = 10) -> dict[str, Any]:
    """busy_seconds, by_kind and top of (name, kind, seconds) entries."""
    seconds: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for name, kind, own in entries:
        seconds[name, kind] += own  # type: ignore[assignment]
        calls[name, kind] += 1
    busy = sum(seconds.values()) or 1e-12
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for (_, kind), own in seconds.items():
        kinds[kind] += own / busy
    largest = [
        (name[:80], kind, own / busy, calls[name, kind] / iterations)
        for (name, kind), own in seconds.most_common(top)
    ]
    shares = dict(sorted(((k, v) for k, v in kinds.items() if v > 0), key=lambda item: -item[1]))
    return {"busy_seconds": busy / iterations, "by_kind": shares, "top": largest}


def of_trace(events: Sequence[Mapping[str, Any]], iterations: int) -> Profile:
    """The profile of a Chrome trace's events: kernels, and the calls that launched them."""
    device = [e for e in events if e.get("cat") in ON_DEVICE]
    if not device:
        raise RuntimeError(
            "the profiler's trace holds no kernel: is CUPTI there, and may this process profile? (a "
            "container may need --cap-add SYS_ADMIN, the driver NVreg_RestrictProfilingToAdminUsers=0)"
        )
    spans = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in device]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    entries = [(str(e["name"]), kind_of([str(e["name"])]), float(e["dur"]) * 1e-6) for e in device]
    called = [str(e["name"]).lower() for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = sum(any(word in name for word in LAUNCHES) for name in called)
    return Profile(
        **summed(entries, iterations),
        idle_share=1 - covered(spans) / wall if wall > 0 else 0.0,
        launches=launches / iterations,
        kernels=len(device) / iterations,
    )


def _of_operators(events: Iterable[Any], iterations: int) -> Profile:
    entries = []
    for event in events:
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        entries.append((event.name, kind_of(names), event.self_cpu_time_total * 1e-6))
    return Profile(**summed(entries, iterations), idle_share=None, launches=None, kernels=None)


def profiled(call: Callable[[], object], device: torch.device, iterations: int = 3) -> Profile:
    """Profile `iterations` calls, after one that warms the profiler up.

    Raises RuntimeError where a GPU's profiler records no kernel.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines are no news to a reader of the figures
    if device.type != "cuda":
        call()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(iterations):
                call()
        return _of_operators(recorded.events() or [], iterations)
    # Of the device alone: recording every operator would slow the host down and widen the gaps.
    with profile(activities=[ProfilerActivity.CUDA]):
        call()
        synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(iterations):
            call()
        synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return of_trace(json.loads(path.read_text())["traceEvents"], iterations)


def profile_or_none(call: Callable[[], object], device: torch.device) -> Profile | None:
    """A profile of a few calls, or None and a warning where the profiler fails: timings need it not."""
    try:
        return profiled(call, device, 3 if device.type == "cuda" else 1)
    except RuntimeError as error:
        log.warning("no profile: %s", str(error).split("\n")[0])
        return None


def format_profile(found: Profile) -> str:
    """Lines for people: shares by kind, then the largest entries."""
    lines = ["  ".join(f"{kind} {100 * share:.1f} %" for kind, share in found.by_kind.items())]
    if found.idle_share is not None:
        lines.append(
            f"{found.kernels:.0f} kernels and {found.launches:.0f} launches an iteration; no kernel runs for "
            f"{100 * found.idle_share:.1f} % of the time"
        )
    lines += [
        f"  {100 * share:5.1f} %  {calls:7.0f} x  {kind:18}  {name}" for name, kind, share, calls in found.top
    ]
    return "\n".join(lines)
