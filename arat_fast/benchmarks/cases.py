"""What a kernel benchmark measures: inputs, the bytes that must move, and the variants that do the same work.

Protocol. Each module in CASE_MODULES has `benchmark_cases(device, small=False) -> Iterator[BenchmarkCase]`,
`small` giving shapes that a CPU checks in a moment. A case's variants take the tensors that `make(seed)`
returns and all return the same values; "ours" comes first, "eager" is the yardstick of correctness. A
variant must not change its inputs: the timer calls it again and again on a ring of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CASE_MODULES = ("arat_fast.benchmarks.elementwise", "arat_fast.benchmarks.split_batch_norm")

Variant = Callable[..., Tensor]


@dataclass(frozen=True)
class BenchmarkCase:
    """One kernel at one shape. `bytes_moved`: what has to be read and written at least, once each."""

    kernel: str
    shape: str
    bytes_moved: int
    make: Callable[[int], tuple[Tensor, ...]]
    variants: Mapping[str, Variant]
    tolerance: float = 0.0

    def check(self) -> None:
        """Assert that every variant returns what "eager" returns, up to `tolerance` (absolute)."""
        inputs = self.make(0)
        expected = self.variants["eager"](*inputs)
        for name, variant in self.variants.items():
            try:
                torch.testing.assert_close(variant(*inputs), expected, rtol=0, atol=self.tolerance)
            except AssertionError as error:
                raise AssertionError(f"{self.kernel}, {self.shape}, {name}: {error}") from None


def all_cases(device: torch.device, small: bool = False) -> Iterator[BenchmarkCase]:
    """The cases of every module that is there, in turn: a run cut short has seen some of each."""
    there = [name for name in CASE_MODULES if importlib.util.find_spec(name) is not None]
    sources = [importlib.import_module(name).benchmark_cases(device, small) for name in there]
    while sources:
        for source in list(sources):
            case = next(source, None)
            if case is None:
                sources.remove(source)
            else:
                yield case
