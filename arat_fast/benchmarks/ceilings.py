"""What the device can do at most: matrix products and copies, measured in the run that is compared with them.

    arat-fast bench ceilings [--device cpu] [--json FILE]

The clock, the temperature and the neighbours of a run are its own, so a data sheet's figures would not do.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from arat_fast.benchmarks.conditions import conditions, float32_products
from arat_fast.benchmarks.timing import seconds_of
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.nn.bf16 import bf16_pays
from arat_fast.training.precision import Precision

REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """Rates of large operations on random data, the fastest of several: what the device can do at most.

    fp32_flop_per_second: TF32 where convolutions are allowed to be. bf16 is None where
    the device is no faster in it. copy_bytes_per_second counts bytes read and bytes written.
    """

    fp32_flop_per_second: float
    bf16_flop_per_second: float | None
    copy_bytes_per_second: float

    def flop_per_second(self, precision: Precision) -> float:
        """Of products in a resolved precision; fp16's rate is bf16's."""
        if precision in ("bf16", "fp16") and self.bf16_flop_per_second is not None:
            return self.bf16_flop_per_second
        return self.fp32_flop_per_second

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate: before and after what is compared with them."""
        halves = [
            rate for rate in (self.bf16_flop_per_second, other.bf16_flop_per_second) if rate is not None
        ]
        return Ceilings(
            max(self.fp32_flop_per_second, other.fp32_flop_per_second),
            max(halves) if halves else None,
            max(self.copy_bytes_per_second, other.copy_bytes_per_second),
        )

    def fields(self) -> dict[str, float | None]:
        """For a record's conditions."""
        return asdict(self)


def matmul_flop_per_second(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """FLOP/s of a square matrix product; side 0: 8192 on a GPU, 1536 on a CPU."""
    n = side or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(REPEATS))


def copy_bytes_per_second(device: torch.device, size: int = 0) -> float:
    """Bytes/s, read plus written, of a copy; size 0: 1 GiB on a GPU, 128 MiB on a CPU."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds_of(lambda: target.copy_(source), device) for _ in range(REPEATS))


@contextlib.contextmanager
def _products_as_convolutions(device: torch.device) -> Iterator[None]:
    """Let float32 products be TF32 where convolutions are: the work that they are the ceiling of."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = float32_products(device) == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """The device's ceilings; `small` for a trial whose figures mean nothing."""
    side, size = (256, 1 << 22) if small else (0, 0)
    half = bf16_pays(device)
    with _products_as_convolutions(device):
        single = matmul_flop_per_second(device, torch.float32, side)
    return Ceilings(
        single,
        matmul_flop_per_second(device, torch.bfloat16, side) if half else None,
        copy_bytes_per_second(device, size),
    )


def describe(ceilings: Ceilings) -> str:
    """One line for people."""
    half = ceilings.bf16_flop_per_second
    return (
        f"ceilings: fp32 {ceilings.fp32_flop_per_second / 1e12:.3g} TFLOP/s, "
        + (f"bf16 {half / 1e12:.3g} TFLOP/s, " if half is not None else "no fast bf16, ")
        + f"copy {ceilings.copy_bytes_per_second / 1e9:.3g} GB/s"
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="arat-fast bench ceilings", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(list(arguments))
    check_writable(options.json)
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or check `arat-fast env`")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    ceilings = measure_ceilings(device)
    print(describe(ceilings))
    if options.json is not None:
        write_json(options.json, {"benchmark": "ceilings", "conditions": conditions(device, ceilings)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
