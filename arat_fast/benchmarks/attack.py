"""Milliseconds a PGD step: eager PyTorch, torchattacks and this project's attacks on the same network.

    arat-fast bench attack [--device cpu] [--model resnet18] [--batch 64] [--json FILE] [--plots FOLDER]

Every attack is first shown to stay in the ball and to reach eager's loss within 2 %, then they take turns.

    eager         arat_fast.reference.pgd, running statistics: fp32, NCHW
    torchattacks  torchattacks.PGD on the same network, where the package is installed
    ours-plain    arat_fast.attacks.PGD on the same network
    ours          the same on the channels-last network of arat_fast.models; ours-bf16, ours-compiled
    fast-folded   the training attack: BatchNorm folded into the convolutions, bf16, compiled and captured
                  where the trainer does so
    eager-batch, ours-batch, fast-batch   by the batch's statistics, which move the running ones; the ratio is
                  to eager-batch
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from arat_fast.benchmarks.attack_variants import (
    BATCH,
    Attack,
    attack_baseline,
    attack_element,
    attack_names,
    build_attack,
    check_attacks,
    networks,
)
from arat_fast.benchmarks.ceilings import Ceilings, describe, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.floors import attack_floors
from arat_fast.benchmarks.profiling import Profile, profile_or_none
from arat_fast.benchmarks.step_variants import Setting, Switch, data
from arat_fast.benchmarks.timing import ratio, take_turns
from arat_fast.commands.table import format_table
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.training.build import check_model, pick_device, use_threads
from arat_fast.training.precision import Precision, resolve_precision


@dataclass(frozen=True)
class AttackOptions:
    """Measure PGD attacks against each other, in milliseconds a step."""

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
    """Of the fast variants."""
    compile: Switch = "auto"
    """Compile; auto: as the trainer does, on a GPU or a CPU with bf16 matrix units."""
    repeats: int = 0
    """Timed turns of each variant; the median counts. 0: 15 on a GPU, 5 on a CPU."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""
    plots: Path | None = None
    """Draw the figures into this folder (needs matplotlib)."""


def _call(attack: Attack, images: Tensor, labels: Tensor) -> Callable[[], object]:
    return lambda: attack(images, labels)


def measure(options: AttackOptions) -> dict[str, Any]:
    """The record: `conditions`, and `variants` by name. Raises TrainingError for an attack that fails."""
    check_model(options.model)
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    use_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    if options.batch < 0 or options.steps < 1 or options.side < 8 or options.repeats < 0:
        raise UserError("--batch and --repeats must be at least 0, --steps at least 1 and --side at least 8")
    batch, turns = options.batch or (128 if on_gpu else 16), options.repeats or (15 if on_gpu else 5)
    setting = Setting(options.model, batch, options.side, options.steps, options.precision, options.compile)
    images, labels = data(setting, device)
    names = attack_names(setting, device, options.variants)
    # Networks of their own for attacks that move the statistics.
    both = {base: networks(setting, device, images) for base in {attack_baseline(name) for name in names}}
    attacks = {name: build_attack(setting, device, name, both[attack_baseline(name)]) for name in names}
    losses = check_attacks(attacks, both, images, labels)
    calls = {name: _call(attack, images, labels) for name, attack in attacks.items()}
    for call in calls.values():
        call()
    before = measure_ceilings(device)
    seconds = take_turns(calls, device, turns, count=2 if on_gpu else 1)
    profiles = {name: profile_or_none(call, device) for name, call in calls.items()} if on_gpu else {}
    ceilings = measure_ceilings(device).best(before)
    record = {
        name: _figures(name, seconds, setting, device, ceilings, profiles.get(name))
        | {"loss_reached": losses[name]}
        for name in names
    }
    precision = resolve_precision(options.precision, device)
    given = asdict(setting) | {"precision": precision, "compile": setting.compiled(device), "repeats": turns}
    return {"benchmark": "attack", "conditions": conditions(device, ceilings, **given), "variants": record}


def _figures(
    name: str,
    seconds: dict[str, list[float]],
    setting: Setting,
    device: torch.device,
    ceilings: Ceilings,
    profile: Profile | None,
) -> dict[str, Any]:
    base = attack_baseline(name)
    element = attack_element(name, setting, device)
    floors = attack_floors(
        setting.model, setting.side, setting.steps, setting.batch, element, name == "fast-folded"
    )
    speeds = sorted(setting.batch / s for s in seconds[name])
    speed = statistics.median(speeds)
    times, spread = ratio(seconds[base], seconds[name])
    peak = ceilings.flop_per_second(resolve_precision(setting.precision, device))
    steps = setting.steps
    return {
        "ms_per_step": 1e3 * statistics.median(seconds[name]) / steps,
        "images_per_second": speed,
        "spread": [speeds[0], speeds[-1]],
        "ratio": times,
        "ratio_spread": spread,
        "baseline": base,
        "mfu": speed * floors.flop / peak,
        "bandwidth_share": speed * floors.bytes / ceilings.copy_bytes_per_second,
        # A captured attack is one launch; its kernels say more.
        "launches_a_step": profile.launches / steps if profile and profile.launches is not None else None,
        "kernels_a_step": profile.kernels / steps if profile and profile.kernels is not None else None,
        "host_gap_share": profile.idle_share if profile else None,
    }


def table(record: dict[str, Any]) -> str:
    """The figures in columns."""
    rows = []
    for name, figures in record["variants"].items():
        low, high = figures["ratio_spread"]
        launches, kernels = figures["launches_a_step"], figures["kernels_a_step"]
        rows.append(
            [
                name,
                f"{figures['ms_per_step']:,.2f}",
                f"{figures['images_per_second']:,.1f}",
                f"{figures['ratio']:.2f}x" + (" (b)" if figures["baseline"] == BATCH else ""),
                f"{low:.2f}-{high:.2f}",
                f"{100 * figures['mfu']:.0f} %",
                f"{100 * figures['bandwidth_share']:.0f} %",
                "-" if launches is None else f"{launches:.1f} / {kernels:.0f}",
            ]
        )
    header = ["attack", "ms/step", "images/s", "ratio", "spread", "MFU", "of copy", "launches / kernels"]
    return format_table(header, rows) + "\n(b): to eager-batch. Launches and kernels are a step's, on a GPU."


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(AttackOptions, args=list(arguments), prog="arat-fast bench attack")
    check_writable(options.json)
    record = measure(options)
    given = record["conditions"]
    print(table(record))
    print(describe(Ceilings(**{name: given[name] for name in Ceilings.__dataclass_fields__})))
    if "torchattacks" not in record["variants"] and not options.variants:
        print("not measured: torchattacks, which is not installed (pip install 'arat-fast[peers]')")
    if options.json is not None:
        write_json(options.json, record)
    if options.plots is not None:
        from arat_fast.benchmarks.plots import draw

        draw([record], options.plots)
    return 0
