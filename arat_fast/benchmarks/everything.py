"""All benchmarks, small, in one run: a summary, one JSON and the pictures.

    arat-fast bench all [--device cpu] [--out bench/out/all]

For figures to be quoted use the benchmarks one by one; this shows where a new machine stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from arat_fast.benchmarks import attack, kernels, loaders, step_measure
from arat_fast.benchmarks.ceilings import describe, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.step_options import StepOptions
from arat_fast.commands.table import format_table
from arat_fast.errors import TrainingError
from arat_fast.evaluation.record import write_json
from arat_fast.training.build import pick_device, use_threads


@dataclass(frozen=True)
class AllOptions:
    """Run all benchmarks, small, and show where this machine stands."""

    out: Path = Path("bench/out/all")
    """Folder of all.json and the pictures."""
    model: str = "resnet18"
    """Network of attack and step: resnet8, resnet18, wrn-34-10."""
    batch: int = 0
    """Images a batch of attack and step; 0: 128 on a GPU, 8 on a CPU."""
    side: int = 32
    """Side of their images in pixels."""
    steps: int = 0
    """Steps of the attack; 0: 10 on a GPU, 2 on a CPU."""
    repeats: int = 0
    """Turns of every variant; 0: 15 on a GPU, 3 on a CPU."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    memory: bool = True
    """Measure peak memory and first iterations, in processes of their own."""
    pictures: bool = True
    """Draw pictures too (needs matplotlib)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""


def measure(options: AllOptions) -> dict[str, Any]:
    """The record: `conditions`, and the records of kernels, attack, step and loaders.

    Raises TrainingError where a variant is wrong.
    """
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    use_threads(options.threads)
    ceilings = measure_ceilings(device)
    print(describe(ceilings), flush=True)
    turns = options.repeats or (15 if on_gpu else 3)
    of_kernels, wrong, _ = kernels.measure_all(device, repeats=turns)
    if wrong:
        raise TrainingError(f"kernels that are wrong: {'; '.join(wrong)}")
    shared: dict[str, Any] = {
        "model": options.model,
        "batch": options.batch or (128 if on_gpu else 8),
        "side": options.side,
        "steps": options.steps or (10 if on_gpu else 2),
        "repeats": turns,
    }
    here: dict[str, Any] = {"threads": options.threads, "device": device.type}
    of_attack = attack.measure(attack.AttackOptions(**shared, **here))
    print(attack.table(of_attack), flush=True)
    torch.compiler.reset()
    of_step = step_measure.measure(StepOptions(**shared, **here, memory=options.memory))
    images = 50_000 if on_gpu else 10_000
    of_loaders = loaders.measure(loaders.LoaderOptions(images=images, repeats=3, device=device.type))  # type: ignore[arg-type]
    return {
        "benchmark": "all",
        "conditions": conditions(device, ceilings, **shared),
        "kernels": of_kernels,
        "attack": of_attack,
        "step": of_step,
        "loaders": of_loaders,
    }


def rows(record: dict[str, Any]) -> list[list[str]]:
    """The summary: a row a claim, [what, ours, against, ratio, MFU or share of copy]."""
    found = []
    by_case: dict[tuple[str, str], dict[str, Any]] = {}
    for row in record["kernels"]["results"]:
        by_case.setdefault((row["kernel"], row["shape"]), {})[row["variant"]] = row
    for (kernel, shape), variants in by_case.items():
        own = variants["ours"]["microseconds"]
        share = f"{100 * variants['copy']['microseconds'] / own:.0f} % of copy"
        ratio = variants["eager"]["microseconds"] / own
        found.append([f"{kernel}, {shape}", f"{own:,.1f} us", "eager", f"{ratio:.2f}x", share])
    for name, unit in (("attack", "ms_per_step"), ("step", "images_per_second")):
        for variant, figures in record[name]["variants"].items():
            if variant.startswith(("fast", "ours")):
                shown = f"{figures[unit]:,.1f} {'ms/step' if name == 'attack' else 'images/s'}"
                share = f"{100 * figures['mfu']:.0f} % MFU"
                found.append(
                    [f"{name} {variant}", shown, figures["baseline"], f"{figures['ratio']:.2f}x", share]
                )
    for variant, figures in record["loaders"]["loaders"].items():
        shown = f"{figures['images_per_second']:,.0f} images/s"
        if variant != loaders.BASELINE:
            found.append([f"loader {variant}", shown, loaders.BASELINE, f"{figures['ratio']:.1f}x", ""])
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(AllOptions, args=list(arguments), prog="arat-fast bench all")
    record = measure(options)
    print("\n" + format_table(["", "ours", "against", "ratio", "of ceiling"], rows(record)))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "all.json", record)
    if options.pictures:
        from arat_fast.benchmarks.plots import draw

        draw([record["kernels"], record["attack"], record["step"]], options.out)
    print(f"written: {options.out}")
    return 0
