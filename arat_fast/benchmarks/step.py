"""Images/s of a whole ARAT iteration: the eager reference, what a skilled user gets, the fast path and its
ingredients.

    arat-fast bench step [--device cpu] [--model resnet18] [--batch 64] [--json FILE] [--plots FOLDER]

All variants start from the same weights and are first shown to agree: the loss terms on given adversarial
images, and the loss that each one's attack reaches. Then they take turns. Images are random and on the device
already. A ratio is the median over the turns of the baseline's time by the variant's.

    eager            arat_fast.reference: fp32, NCHW, two forwards, TF32 convolutions where the GPU has them
    strong           the same under bf16 autocast (where bf16 is fast), channels-last
    strong-compiled  and its network compiled, parameters frozen during the attack
    fast             TrainStep, as the trainer builds it for this device
    fast-no-X        fast without one ingredient: capture (as a CUDA graph), compile, bf16, join (adding
                     gradients in BatchNorm's backward)
    fast-guarded     fast, undoing iterations that are not finite, as the trainer does
    eager-running    eager, attacking running statistics; another attack, so ratios are among its own
    fast-folded      fast, attacking running statistics folded into the convolutions
    eager-compiled   plain torch.compile of eager's network; only when named in --variants
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from arat_fast.benchmarks.ceilings import Ceilings, describe
from arat_fast.benchmarks.profiling import Profile, format_profile
from arat_fast.benchmarks.step_measure import measure, prepare
from arat_fast.benchmarks.step_options import StepOptions
from arat_fast.benchmarks.step_variants import BASELINES
from arat_fast.commands.table import format_table
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.training.build import pick_device


def table(record: dict[str, Any]) -> str:
    """The figures in columns."""
    rows = []
    for name, figures in record["variants"].items():
        low, high = figures["spread"]
        memory, compiling = figures["peak_memory_bytes"], figures["compile_seconds"]
        gaps = figures["host_gap_share"]
        rows.append(
            [
                name,
                f"{figures['images_per_second']:,.1f}",
                f"{low:,.1f}-{high:,.1f}",
                f"{figures['ratio']:.2f}x" + (" (r)" if name in BASELINES else ""),
                f"{100 * figures['mfu']:.0f} %",
                f"{100 * figures['bandwidth_share']:.0f} %",
                "-" if memory is None else f"{memory / 2**20:,.0f}",
                "-" if compiling is None else f"{compiling:.0f} / {figures['compile_seconds_cached']:.0f}",
                "-" if gaps is None else f"{100 * gaps:.0f} %",
            ]
        )
    header = ["variant", "images/s", "spread", "ratio", "MFU", "of copy", "MiB", "compile s / cached", "gaps"]
    note = (
        "(r): to eager-running. MFU, of copy: of a matrix product's and a copy's rate in this run; "
        "gaps: no kernel runs."
    )
    return format_table(header, rows) + "\n" + note


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(StepOptions, args=list(arguments), prog="arat-fast bench step")
    check_writable(options.json)
    device = pick_device(options.device)
    if options.prepare:
        if options.caches is None or options.json is None:
            raise UserError("--prepare needs --caches and --json: a folder and a file for what it leaves")
        write_json(options.json, prepare(options, options.caches))
        return 0
    record = measure(options)
    given = record["conditions"]
    print(table(record))
    print(describe(Ceilings(**{name: given[name] for name in Ceilings.__dataclass_fields__})))
    processor = given["cpu"] if given["gpu"] is None or device.type == "cpu" else given["gpu"]["name"]
    print(
        f"{given['model']}, batch {given['batch']}, PGD-{given['steps']}, {given['precision']}, "
        f"{'compiled' if given['compile'] else 'not compiled'}, {given['threads']} threads, {processor}, "
        f"load {given['load_average'][0]}"
    )
    floors = given["floors_images_per_second"]
    print(
        f"floors of fast: arithmetic {floors['arithmetic']:,.4g} images/s, bytes {floors['bytes']:,.4g}, "
        f"one after the other {floors['in_turn']:,.4g}"
    )
    for name, figures in record["variants"].items():
        if figures["profile"] is not None:
            print(f"\n{name}: where the time goes")
            print(format_profile(Profile(**figures["profile"])))
    if given["left_out"]:
        print(f"left out for lack of time: {', '.join(given['left_out'])}")
    if options.json is not None:
        write_json(options.json, record)
    if options.plots is not None:
        from arat_fast.benchmarks.plots import draw

        draw([record], options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
