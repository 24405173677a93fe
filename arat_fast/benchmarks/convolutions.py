"""What the convolutions of an ARAT iteration cost alone: the ceiling of everything that calls a library's.

    arat-fast bench convolutions [--device cpu] [--model resnet18] [--batch 128] [--json FILE]

Each distinct convolution of the network, channels-last, in the precision that the trainer picks: forward and
input gradient of a batch, as an attack step needs them; forward, input and weight gradient of [clean; adv],
twice the batch, as the training pass does. The sums, with each convolution as often as the network holds it,
say how long an iteration would take if nothing but convolutions took time. A call finds its inputs where the
last one left them, on a GPU mostly in its L2 cache, and replays from a CUDA graph: the library at its best.

The first convolution is tried with its three channels padded to 4 and 8 as well: libraries are slow on three.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.benchmarks.ceilings import Ceilings, describe, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.kernels import captured
from arat_fast.benchmarks.timing import take_turns
from arat_fast.commands.table import format_table
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.training.build import check_model, pick_device, use_threads
from arat_fast.training.precision import DTYPES, Precision, resolve_precision

PASSES = ("forward", "input gradient", "weight gradient")
CALLS = 10  # in a row on a GPU: one is shorter than what it takes to launch it


@dataclass(frozen=True)
class ConvolutionOptions:
    """Measure a network's convolutions alone, and how fast an iteration of nothing else would be."""

    model: str = "resnet18"
    """Network: resnet8, resnet18, wrn-34-10."""
    batch: int = 0
    """Images a batch; 0: 128 on a GPU, 16 on a CPU."""
    side: int = 32
    """Side of the images in pixels."""
    steps: int = 10
    """Steps of the attack."""
    precision: Precision = "auto"
    """Of activations and weights."""
    repeats: int = 0
    """Timed turns; the median counts. 0: 7 on a GPU, 3 on a CPU."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""


@dataclass(frozen=True)
class Convolution:
    """One shape: channels, square kernel, stride, padding, and the side of its square input."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    side: int

    @property
    def flop(self) -> int:
        """Operations an image of each of its passes."""
        out = (self.side + 2 * self.padding - self.kernel) // self.stride + 1
        return 2 * out * out * self.outputs * self.inputs * self.kernel**2

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.inputs} to {self.outputs}, {self.kernel}x{self.kernel}{stride}, side {self.side}"


def convolutions_of(model: str, side: int) -> tuple[Convolution, Counter[Convolution]]:
    """(the first, how often the network holds each shape); nothing is allocated."""
    found: list[Convolution] = []

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        stride, padding = layer.stride[0], layer.padding[0]
        assert isinstance(padding, int)
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size[0], stride, padding
        found.append(Convolution(*sizes, inputs[0].shape[-1]))

    with torch.device("meta"):
        network = reference.MODELS[model](10, 3).eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(seen)
        network(torch.empty(1, 3, side, side))
    return found[0], Counter(found)


def random_tensors(
    shape: Convolution, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(images, weights, gradient of the output) of one convolution, channels-last."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)

    x = random(count, shape.inputs, shape.side, shape.side)
    w = random(shape.outputs, shape.inputs, shape.kernel, shape.kernel)
    return x, w, torch.randn_like(torch.nn.functional.conv2d(x, w, None, shape.stride, shape.padding))


def calls_of(shape: Convolution, x: Tensor, w: Tensor, dy: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each pass alone."""
    stride, padding = [shape.stride] * 2, [shape.padding] * 2

    def gradient(of: int) -> Callable[[], Tensor]:
        mask = [of == 0, of == 1, False]
        backward = torch.ops.aten.convolution_backward
        return lambda: backward(dy, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, mask)[of]

    def forward() -> Tensor:
        return torch.nn.functional.conv2d(x, w, None, stride, padding)

    return dict(zip(PASSES, (forward, gradient(0), gradient(1)), strict=True))


def _seconds(
    shape: Convolution,
    count: int,
    passes: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    turns: int,
) -> dict[str, float]:
    tensors = random_tensors(shape, count, device, dtype)
    calls: dict[str, Callable[[], object]] = {
        name: call for name, call in calls_of(shape, *tensors).items() if name in passes
    }
    each = CALLS if device.type == "cuda" else 1

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(each)]

    if device.type == "cuda":
        calls = {name: captured(repeated(call)) for name, call in calls.items()}
    for call in calls.values():
        call()
    turned = take_turns(calls, device, turns, count=each)
    return {name: statistics.median(seconds) / each for name, seconds in turned.items()}


def measure(options: ConvolutionOptions) -> dict[str, Any]:
    """The record: `conditions`, `convolutions` (a row for a shape, batch and pass), `iteration`."""
    check_model(options.model)
    if min(options.batch, options.repeats, options.threads) < 0 or options.steps < 1 or options.side < 8:
        raise UserError(
            "--batch, --repeats and --threads must be at least 0, --steps at least 1 and --side at least 8"
        )
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    use_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    precision = resolve_precision(options.precision, device)
    dtype = DTYPES[precision]
    batch, turns = options.batch or (128 if on_gpu else 16), options.repeats or (7 if on_gpu else 3)
    first, counts = convolutions_of(options.model, options.side)
    before = measure_ceilings(device)
    rows: list[dict[str, Any]] = []

    def add(shape: Convolution, held: int, images: int, passes: Sequence[str]) -> None:
        for name, seconds in _seconds(shape, images, passes, device, dtype, turns).items():
            per_second = images * shape.flop / seconds
            fields = asdict(shape) | {"count": held, "batch": images, "pass": name}
            rows.append(fields | {"milliseconds": 1e3 * seconds, "flop_per_second": per_second})

    for shape, held in counts.items():
        add(shape, held, batch, PASSES[:2])
        # Nobody asks for the gradient of the training pass's images.
        add(shape, held, 2 * batch, [p for p in PASSES if shape != first or p != "input gradient"])
        if on_gpu:
            torch.cuda.empty_cache()
    for channels in (4, 8):  # shown, and not counted
        add(replace(first, inputs=channels), 0, batch, PASSES[:2])
    ceilings = measure_ceilings(device).best(before)
    peak = ceilings.flop_per_second(precision)
    for row in rows:
        row["share"] = row["flop_per_second"] / peak

    def sum_of(images: int) -> tuple[float, float]:
        taken = [row for row in rows if row["batch"] == images]
        seconds = sum(row["count"] * row["milliseconds"] / 1e3 for row in taken)
        flop = sum(row["count"] * row["milliseconds"] / 1e3 * row["flop_per_second"] for row in taken)
        return seconds, flop

    (step, step_flop), (training, training_flop) = sum_of(batch), sum_of(2 * batch)
    whole = options.steps * step + training
    flop = options.steps * step_flop + training_flop
    given = {
        "model": options.model,
        "batch": batch,
        "side": options.side,
        "attack_steps": options.steps,
        "precision": precision,
        "repeats": turns,
    }
    return {
        "benchmark": "convolutions",
        "conditions": conditions(device, ceilings, **given),
        "convolutions": rows,
        "iteration": {
            "attack_step_milliseconds": 1e3 * step,
            "training_milliseconds": 1e3 * training,
            "milliseconds": 1e3 * whole,
            "images_per_second": batch / whole,
            "flop_an_image": flop / batch,
            "share": flop / whole / peak,
        },
    }


def table(record: dict[str, Any]) -> str:
    """A line a convolution: milliseconds of each pass, and its share of a matrix product's rate."""
    batch = record["conditions"]["batch"]
    columns = [(batch, name) for name in PASSES[:2]] + [(2 * batch, name) for name in PASSES]
    lines: dict[Convolution, dict[tuple[int, str], str]] = {}
    held: dict[Convolution, int] = {}
    for row in record["convolutions"]:
        shape = Convolution(**{name: row[name] for name in Convolution.__dataclass_fields__})
        cell = f"{row['milliseconds']:.3f} ({100 * row['share']:.0f} %)"
        lines.setdefault(shape, {})[row["batch"], row["pass"]] = cell
        held[shape] = row["count"]
    rows = [
        [str(shape), str(held[shape] or "trial"), *(cells.get(column, "-") for column in columns)]
        for shape, cells in lines.items()
    ]
    header = [f"{name}, {images}" for images, name in columns]
    return (
        format_table(["convolution", "held", *header], rows)
        + "\nms (share of a matrix product's rate) of so many images"
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(ConvolutionOptions, args=list(arguments), prog="arat-fast bench convolutions")
    check_writable(options.json)
    record = measure(options)
    given, whole = record["conditions"], record["iteration"]
    print(table(record))
    print(describe(Ceilings(**{name: given[name] for name in Ceilings.__dataclass_fields__})))
    print(
        f"{given['model']}, batch {given['batch']}, {given['precision']}: convolutions alone take "
        f"{whole['attack_step_milliseconds']:.3g} ms an attack step and "
        f"{whole['training_milliseconds']:.3g} ms a training pass; PGD-{given['attack_steps']} ARAT cannot "
        f"pass {whole['images_per_second']:,.4g} images/s, {100 * whole['share']:.0f} % of a product's rate"
    )
    if options.json is not None:
        write_json(options.json, record)
    return 0
