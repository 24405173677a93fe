"""Every kernel against eager PyTorch and a copy of as many bytes; on a GPU captured, and against Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from arat_fast.benchmarks.cases import BenchmarkCase, all_cases
from arat_fast.benchmarks.kernels import ring_of_calls


def _cases() -> Iterator[object]:
    # Names only: a case's inputs are made when it is measured.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in all_cases(device):
        yield pytest.param(case.kernel, case.shape, id=f"{case.kernel}, {case.shape}")


@pytest.mark.parametrize(("kernel", "shape"), list(_cases()))
def test_kernel(kernel: str, shape: str, compare: Callable[..., None], device: torch.device) -> None:
    torch.compiler.reset()
    case: BenchmarkCase | None = None
    for found in all_cases(device):
        if (found.kernel, found.shape) == (kernel, shape):
            case = found
    if case is None:
        pytest.skip(f"no such case on {device}")
    calls, count = ring_of_calls(case)
    compare(
        f"{kernel}, {shape}",
        calls,
        check=lambda: None,  # ring_of_calls has compared every variant with eager
        floors={"bytes": case.bytes_moved},
        calls=count,
    )
