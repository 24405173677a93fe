"""Images/s of a whole ARAT iteration: the eager reference, what a skilled user gets, the fast path and its
ingredients.

    arat-fast bench step [--device cpu] [--model resnet18] [--batch 64] [--json FILE]

All variants start from the same weights and are first shown to agree: the loss terms of one iteration on
given adversarial images. Then they take turns, and the median iteration counts. Images are random and on the
device already.

    eager          arat_fast.reference: fp32, NCHW, two forwards, TF32 convolutions where the GPU has them
    strong         the same under bf16 autocast (where there are matrix units for it), channels-last
    fast           TrainStep with precision and compilation as asked for
    fast-no-X      fast without one ingredient: compile, bf16
    eager-running  eager, attacking running statistics; another attack, so ratios are among its own
    fast-folded    fast, attacking running statistics folded into the convolutions
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from arat_fast import methods, reference
from arat_fast.commands.table import format_table
from arat_fast.config import ARATConfig, AttackConfig, TrainConfig
from arat_fast.environment import environment
from arat_fast.errors import TrainingError, unknown_name
from arat_fast.evaluation.record import write_json
from arat_fast.models import create_model
from arat_fast.nn import from_authors
from arat_fast.training.build import check_model, pick_device
from arat_fast.training.cost import iteration_cost
from arat_fast.training.precision import Precision, resolve_precision
from arat_fast.training.step import TrainStep

Iteration = Callable[..., dict[str, Tensor]]
BASELINES = {"eager-running": "eager-running", "fast-folded": "eager-running"}


@dataclass(frozen=True)
class StepOptions:
    """Measure a whole ARAT iteration against the eager reference, in images/s."""

    model: str = "resnet18"
    """Network: resnet8, resnet18, wrn-34-10."""
    batch: int = 128
    """Images a batch."""
    side: int = 32
    """Side of the images in pixels."""
    steps: int = 10
    """Steps of the attack."""
    variants: str = ""
    """Comma-separated names; default: all that differ here."""
    precision: Precision = "auto"
    """Of the fast variants."""
    compile: bool = False
    """Compile the fast variants."""
    repeats: int = 5
    """Timed iterations of each variant; the median counts."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    memory: bool = True
    """Measure each variant's peak memory, in a process of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""


def _attack(options: StepOptions, variant: str) -> AttackConfig:
    return AttackConfig(steps=options.steps, bn="running" if variant in BASELINES else "batch")


def _reference(
    options: StepOptions, device: torch.device, variant: str, state: dict[str, Tensor]
) -> Iteration:
    network = reference.MODELS[options.model](10, 3)
    network.load_state_dict(state)
    torch.manual_seed(1)
    method = reference.ARAT(network).to(device)
    layout = torch.channels_last if variant == "strong" else torch.contiguous_format
    method.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    attack = _attack(options, variant)
    half = variant == "strong" and resolve_precision(options.precision, device) == "bf16"

    def iterate(images: Tensor, labels: Tensor, x_adv: Tensor | None = None) -> dict[str, Tensor]:
        context = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with context:
            return reference.train_step(
                method,
                optimizer,
                images.contiguous(memory_format=layout),
                labels,
                steps=attack.steps,
                batch_statistics=attack.bn == "batch",
                x_adv=None if x_adv is None else x_adv.contiguous(memory_format=layout),
            )

    return iterate


def _fast(options: StepOptions, device: torch.device, variant: str, state: dict[str, Tensor]) -> Iteration:
    model = create_model(options.model)
    model.load_state_dict(from_authors(state))
    layers: Sequence[str] = getattr(model, "invariance_layers")  # noqa: B009
    dims = {name: int(getattr(model.get_submodule(name), "num_features")) for name in layers}  # noqa: B009
    torch.manual_seed(1)
    method = methods.ARAT(ARATConfig(), dims)
    model.to(device)
    method.to(device)
    parameters = [*model.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    return TrainStep(
        model,
        method,
        optimizer,
        attack=_attack(options, variant),
        precision="fp32" if variant == "fast-no-bf16" else options.precision,
        compiled=options.compile and variant != "fast-no-compile",
    )


def _names(options: StepOptions, device: torch.device) -> list[str]:
    half = resolve_precision(options.precision, device) == "bf16"
    names = ["eager", "strong", "fast"]
    names += ["fast-no-compile"] if options.compile else []
    names += ["fast-no-bf16"] if half else []
    names += ["eager-running", "fast-folded"]
    if not options.variants:
        return names
    chosen = [name.strip() for name in options.variants.split(",")]
    for name in chosen:
        if name not in names:
            raise unknown_name("variant", name, names)
    baselines = {BASELINES.get(name, "eager") for name in chosen}
    return [name for name in names if name in chosen or name in baselines]


def _build(options: StepOptions, device: torch.device, variant: str) -> Iteration:
    torch.manual_seed(0)
    state = reference.MODELS[options.model](10, 3).state_dict()
    make = _fast if variant.startswith("fast") else _reference
    return make(options, device, variant, state)


def _data(options: StepOptions, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, options.side, options.side, generator=generator)
    return images.to(device), (torch.arange(options.batch) % 10).to(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _check_agreement(
    options: StepOptions, device: torch.device, variants: dict[str, Iteration], images: Tensor, labels: Tensor
) -> None:
    """Each variant's loss terms on given adversarial images within 1e-4 of eager's, 3e-2 in bf16."""
    x_adv = (
        images + 8 / 255 * torch.sin(2.17 * torch.arange(images.numel(), device=device)).view_as(images)
    ).clamp(0, 1)
    metrics = {name: iterate(images, labels, x_adv=x_adv) for name, iterate in variants.items()}
    half = resolve_precision(options.precision, device) == "bf16"
    for name, ours in metrics.items():
        exact = name.startswith("eager") or name == "fast-no-bf16" or not half
        for term, value in metrics["eager" if "eager" in metrics else "eager-running"].items():
            if term.startswith("accuracy"):
                continue
            error = abs(float(ours[term]) - float(value)) / max(abs(float(value)), 1e-6)
            if not error < (1e-4 if exact else 3e-2):
                raise TrainingError(f"variant {name}: {term} is {float(ours[term])}, eager's {float(value)}")


def _ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in the compute precision: median of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    seconds = []
    for _ in range(5):
        _synchronise(device)
        started = time.perf_counter()
        a @ b
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds)


def _peak_memory(options: StepOptions, variant: str) -> int:
    """Peak bytes of one variant's two iterations in a process of its own: the GPU's, else the process's."""
    arguments = [
        "--model", options.model, "--batch", str(options.batch), "--side", str(options.side), "--steps", "2",
        "--precision", options.precision, "--threads", str(options.threads), "--device", options.device,
        "--compile" if options.compile else "--no-compile",
    ]  # fmt: skip
    command = [sys.executable, "-m", "arat_fast.benchmarks.step", "--peak-of", variant, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise TrainingError(f"variant {variant} failed alone: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout.strip().splitlines()[-1])


def _peak_of(variant: str, options: StepOptions) -> int:
    device = pick_device(options.device)
    iterate = _build(options, device, variant)
    images, labels = _data(options, device)
    for _ in range(2):
        iterate(images, labels)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: it survives exec, so a child starts with its parent's peak.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(options: StepOptions) -> dict[str, Any]:
    """The record: `conditions`, and `variants` by name. Raises TrainingError when variants disagree."""
    check_model(options.model)
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = _names(options, device)
    variants = {name: _build(options, device, name) for name in names}
    images, labels = _data(options, device)
    _check_agreement(options, device, variants, images, labels)
    first: dict[str, float] = {}
    for name, iterate in variants.items():
        started = time.perf_counter()
        iterate(images, labels)
        _synchronise(device)
        first[name] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, iterate in variants.items():
            started = time.perf_counter()
            iterate(images, labels)
            _synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    config = replace(TrainConfig(), model=options.model, attack=_attack(options, "eager"))
    flop = iteration_cost(config, (options.side, options.side, 3), 10).iteration_flop
    precision = resolve_precision(options.precision, device)
    ceiling = _ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    record: dict[str, Any] = {}
    for name in names:
        speeds = sorted(options.batch / s for s in seconds[name])
        speed = statistics.median(speeds)
        baseline = statistics.median(seconds[BASELINES.get(name, "eager")])
        record[name] = {
            "images_per_second": speed,
            "spread": [speeds[0], speeds[-1]],
            "ratio": baseline / statistics.median(seconds[name]),
            "mfu": speed * flop / ceiling,
            "first_iteration_seconds": first[name],
            "peak_memory_bytes": _peak_memory(options, name) if options.memory else None,
        }
    conditions = environment(device) | {
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "model": options.model,
        "batch": options.batch,
        "side": options.side,
        "attack_steps": options.steps,
        "precision": precision,
        "compile": options.compile,
        "repeats": options.repeats,
        "flop_an_image": flop,
        "matmul_flop_per_second": ceiling,
    }
    return {"conditions": conditions, "variants": record}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    rest = list(arguments)
    peak_of = rest.pop(1) if rest[:1] == ["--peak-of"] else None
    options = tyro.cli(StepOptions, args=rest[1:] if peak_of else rest, prog="arat-fast bench step")
    if peak_of:
        print(_peak_of(peak_of, options))
        return 0
    record = measure(options)
    rows = []
    for name, figures in record["variants"].items():
        low, high = figures["spread"]
        memory = figures["peak_memory_bytes"]
        rows.append(
            [
                name,
                f"{figures['images_per_second']:,.1f}",
                f"{low:,.1f}-{high:,.1f}",
                f"{figures['ratio']:.2f}x",
                f"{100 * figures['mfu']:.0f} %",
                "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ]
        )
    print(format_table(["variant", "images/s", "spread", "ratio", "MFU", "peak memory"], rows))
    print(
        json.dumps({k: record["conditions"][k] for k in ("cpu", "threads", "precision", "compile", "batch")})
    )
    if options.json is not None:
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
