"""What an ARAT iteration takes without its convolutions: what all who call a library's can still improve.

    arat-fast bench rest [--device cpu] [--model resnet18] [--batch 64] [--compile on] [--json FILE]

The variants of `arat-fast bench step`, with every convolution replaced by one that computes nothing: its
output and its gradients are copies of constants, of the right shape, dtype and layout, and to write them is
the least that any convolution does. What comes out means nothing and is not checked; the other benchmark does
that. BatchNorm, ReLU, additions, casts, the losses, the PGD steps, the optimizer and the host are
what remains. Together with `arat-fast bench convolutions` this tells how an iteration would fare where
convolutions are faster than here.

Not the attacks on running statistics: folded, they have little left but convolutions.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from arat_fast.benchmarks.ceilings import Ceilings, describe, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.step_variants import BASELINES, PLAIN, Setting, build, data, variant_names
from arat_fast.benchmarks.timing import ratio, take_turns
from arat_fast.commands.table import format_table
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.training.build import check_model, pick_device, use_threads
from arat_fast.training.precision import Precision, resolve_precision

LEFT_OUT = {*BASELINES, PLAIN, "fast-guarded", "fast-no-bf16"}


@dataclass(frozen=True)
class RestOptions:
    """Measure an ARAT iteration without its convolutions, against the eager reference."""

    model: str = "resnet18"
    """Network: resnet8, resnet18, wrn-34-10."""
    batch: int = 0
    """Images a batch; 0: 128 on a GPU, 64 on a CPU."""
    side: int = 32
    """Side of the images in pixels."""
    steps: int = 2
    """Steps of the attack."""
    precision: Precision = "auto"
    """Of the fast variants, and whether the strong ones may use bf16."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile; auto: as the trainer does, on a GPU or a CPU with bf16 matrix units."""
    repeats: int = 0
    """Timed turns of each variant; the median counts. 0: 15 on a GPU, 9 on a CPU."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: Path | None = None
    """Write the figures and their conditions to this file."""


@functools.cache
def _constant(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(shape, device=device)
    return values.to(dtype, memory_format=torch.channels_last)


def _copy(shape: Sequence[int], like: Tensor) -> Tensor:
    # Of its own: what an operator returns, a compiler may write over.
    return _constant(tuple(shape), like.dtype, like.device).clone()


_library = torch.library.Library("arat_fast_bench", "DEF")
_library.define("constant_convolution(Tensor x, Tensor w, int stride, int padding) -> Tensor")
# The gradient of the output is not looked at; without it a compiler would leave out whatever computes it.
_library.define("constant_gradients(Tensor dy, Tensor x, Tensor w, bool of_x, bool of_w) -> (Tensor, Tensor)")


def _output_shape(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    height, width = ((side + 2 * padding - w.shape[2]) // stride + 1 for side in x.shape[2:])
    return x.shape[0], w.shape[0], height, width


def _convolution(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    return _copy(_output_shape(x, w, stride, padding), x)


def _convolution_backward(dy: Tensor, x: Tensor, w: Tensor, of_x: bool, of_w: bool) -> tuple[Tensor, Tensor]:
    def one(t: Tensor, needed: bool) -> Tensor:
        return _copy(t.shape, t) if needed else t.new_empty(0)

    return one(x, of_x), one(w, of_w)


def _fake(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    shape = _output_shape(x, w, stride, padding)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _fake_backward(dy: Tensor, x: Tensor, w: Tensor, of_x: bool, of_w: bool) -> tuple[Tensor, Tensor]:
    def one(t: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(t, memory_format=torch.channels_last) if needed else t.new_empty(0)

    return one(x, of_x), one(w, of_w)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_w = ctx.needs_input_grad[:2]
    dx, dw = torch.ops.arat_fast_bench.constant_gradients(dy, *ctx.saved_tensors, of_x, of_w)
    return dx if of_x else None, dw if of_w else None, None, None


_library.impl("constant_convolution", _convolution, "CompositeExplicitAutograd")
_library.impl("constant_gradients", _convolution_backward, "CompositeExplicitAutograd")
torch.library.register_fake("arat_fast_bench::constant_convolution", _fake, lib=_library)
torch.library.register_fake("arat_fast_bench::constant_gradients", _fake_backward, lib=_library)
torch.library.register_autograd(
    "arat_fast_bench::constant_convolution", _backward, setup_context=_setup, lib=_library
)


def _forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # as autocast does for a convolution
        half = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(half), weight.to(half)
    stride, padding = layer.stride[0], layer.padding[0]
    y: Tensor = torch.ops.arat_fast_bench.constant_convolution(x, weight, stride, padding)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


@contextmanager
def constant_convolutions() -> Iterator[None]:
    """In here every `nn.Conv2d` answers with constants."""
    original = nn.Conv2d._conv_forward
    nn.Conv2d._conv_forward = _forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = original  # type: ignore[method-assign]


def measure(options: RestOptions) -> dict[str, Any]:
    """The record: `conditions` and `variants`: name -> milliseconds, spread and ratio to eager."""
    check_model(options.model)
    if min(options.batch, options.repeats, options.threads) < 0 or options.steps < 1 or options.side < 8:
        raise UserError(
            "--batch, --repeats and --threads must be at least 0, --steps at least 1 and --side at least 8"
        )
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    use_threads(options.threads)
    batch, turns = options.batch or (128 if on_gpu else 64), options.repeats or (15 if on_gpu else 9)
    setting = Setting(options.model, batch, options.side, options.steps, options.precision, options.compile)
    images, labels = data(setting, device)
    with constant_convolutions():
        names = [name for name in variant_names(setting, device) if name not in LEFT_OUT]
        iterations = {name: build(setting, device, name) for name in names}
        for iterate in iterations.values():
            for _ in range(3):  # compiles, captures, warms up
                iterate(images, labels)
        calls = {name: (lambda i=iterate: i(images, labels)) for name, iterate in iterations.items()}
        seconds = take_turns(calls, device, turns)
    ceilings = measure_ceilings(device)
    variants = {}
    for name, each in seconds.items():
        times, spread = ratio(seconds["eager"], each)
        variants[name] = {
            "milliseconds": 1e3 * statistics.median(each),
            "spread": [1e3 * min(each), 1e3 * max(each)],
            "ratio": times,
            "ratio_spread": spread,
        }
    given = {
        "model": options.model,
        "batch": batch,
        "side": options.side,
        "attack_steps": options.steps,
        "precision": resolve_precision(options.precision, device),
        "compile": setting.compiled(device),
        "repeats": turns,
    }
    return {
        "benchmark": "rest",
        "conditions": conditions(device, ceilings, **given),
        "variants": variants,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(RestOptions, args=list(arguments), prog="arat-fast bench rest")
    check_writable(options.json)
    record = measure(options)
    given = record["conditions"]
    rows = [
        [
            name,
            f"{of['milliseconds']:.1f}",
            "{:.1f}-{:.1f}".format(*of["spread"]),
            f"{of['ratio']:.2f}x",
            "{:.2f}-{:.2f}".format(*of["ratio_spread"]),
        ]
        for name, of in record["variants"].items()
    ]
    print(format_table(["variant", "ms", "least-most", "ratio", "least-most"], rows))
    print(describe(Ceilings(**{name: given[name] for name in Ceilings.__dataclass_fields__})))
    print(
        f"{given['model']}, batch {given['batch']}, PGD-{given['attack_steps']}, {given['precision']}, "
        f"{'compiled' if given['compile'] else 'not compiled'}, without convolutions, "
        f"{given['threads']} threads, load {given['load_average'][0]}"
    )
    if options.json is not None:
        write_json(options.json, record)
    return 0
