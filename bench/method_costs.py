"""What each method costs relative to adversarial training: python bench/method_costs.py [--json FILE]

Counted: operations an image in one iteration on the fast path (`arat_fast.training.cost`), over AT's.
Measured: seconds of an iteration over AT's (on a CPU the process's own), the methods taking turns in one
process, turn divided by turn; median and [least, most]. Random images, weights as drawn, ten steps of each
method's published attack: AT's and ARAT's on batch statistics; TRADES', MART's, MAIL's and LBGAT's on running
statistics, which are folded into the convolutions and take less time than their operations say. LBGAT's
teacher is the plain ResNet-18 here, a third of its authors' network.
The committed CPU result is bench/results/method_costs_cpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.timing import ratio, take_turns
from arat_fast.commands.table import format_table
from arat_fast.config import EMRConfig, LBGATConfig, TRADESConfig, TrainConfig, resolved
from arat_fast.evaluation.record import write_json
from arat_fast.nn.bf16 import has_bf16_matrix_units
from arat_fast.training.build import build_fast, pick_device
from arat_fast.training.cost import iteration_cost
from arat_fast.training.precision import resolve_precision
from arat_fast.training.step import TrainStep

EMR = {"emr": EMRConfig(1 / 128, 1.0)}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "at": ("at", {}),
    "standard": ("standard", {}),
    "arat": ("arat", {}),
    "trades": ("trades", {}),
    "trades, duplicate forward": ("trades", {"trades": TRADESConfig(duplicate_forward=True)}),
    "mart": ("mart", {}),
    "mail-at": ("mail-at", {}),
    "mail-trades": ("mail-trades", {}),
    "mail-mart": ("mail-mart", {}),
    "lbgat, beta 0": ("lbgat", {"lbgat": LBGATConfig(teacher="resnet18")}),
    "lbgat, beta 6": ("lbgat", {"lbgat": LBGATConfig(beta=6.0, teacher="resnet18")}),
    "arrest": ("arrest", {}),
    "at+emr": ("at", EMR),
    "trades+emr": ("trades", EMR),
    "mart+emr": ("mart", EMR),
    "mail-at+emr": ("mail-at", EMR),
    "arat+emr": ("arat", EMR),
}


def step_of(config: TrainConfig, device: torch.device) -> TrainStep:
    """The configured iteration with a network of its own."""
    network, method = build_fast(config, 3, 10)
    network.to(device)
    method.to(device)
    parameters = [p for m in (network, method) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    step = TrainStep(
        network,
        method,
        optimizer,
        attack=config.attack,
        compiled=device.type == "cuda" or has_bf16_matrix_units(device),
    )
    method.compute = step.dtype
    return step


def call_of(step: TrainStep, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    return lambda: step(images, labels)


def turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of this process, which other work on the machine hardly changes."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    device = pick_device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, 32, 32, generator=generator).to(device)
    labels = (torch.arange(options.batch) % 10).to(device)
    calls, counted = {}, {}
    for name, (method, settings) in VARIANTS.items():
        config = resolved(
            dataclasses.replace(TrainConfig(), method=method, model=options.model, **settings)  # type: ignore[arg-type]
        )
        counted[name] = iteration_cost(config, (32, 32, 3), 10).iteration_flop
        calls[name] = call_of(step_of(config, device), images, labels)
        calls[name]()  # folds, compiles, captures
    before = conditions(
        device,
        None,
        model=options.model,
        batch=options.batch,
        attack_steps=TrainConfig().attack.steps,
        precision=resolve_precision("auto", device),
        repeats=options.repeats,
        clock="device" if device.type == "cuda" else "CPU seconds of the process",
    )
    seconds = (
        take_turns(calls, device, options.repeats) if device.type == "cuda" else turns(calls, options.repeats)
    )
    result: dict[str, Any] = {}
    for name in calls:
        middle, spread = ratio(seconds[name], seconds["at"])
        result[name] = {
            "flop_an_image": counted[name],
            "flop_ratio": counted[name] / counted["at"],
            "time_ratio": middle,
            "time_ratio_spread": spread,
            "seconds": statistics.median(seconds[name]),
        }
    rows = [
        [
            name,
            f"{figures['flop_ratio']:.2f}x",
            f"{figures['time_ratio']:.2f}x",
            "{:.2f}-{:.2f}".format(*figures["time_ratio_spread"]),
            f"{figures['seconds']:.3f}",
        ]
        for name, figures in result.items()
    ]
    print(format_table(["method", "FLOP / AT", "time / AT", "spread", "seconds"], rows))
    if options.json is not None:
        write_json(options.json, {"conditions": before, "methods": result})


if __name__ == "__main__":
    main()
