"""Kernel tests run three ways from one source.

pytest tests/kernels                      public functions reach the reference twins (CPU)
TRITON_INTERPRET=1 pytest tests/kernels   the same calls launch the Triton kernels in the interpreter (CPU)
pytest -m gpu tests/kernels               the same calls launch the compiled kernels (CUDA or ROCm)

A test takes the fixture `device`, builds its inputs there, calls the public function and compares with the
twin or with float64. Marks, canaries and the accuracy rule are in exactness.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from exactness import Canary
from launch_checks import watch_launches

from arat_fast.kernels.dispatch import INTERPRETING


def _repair_interpreter() -> None:
    """Give the interpreter the GPU's bfloat16 casts, and Triton 3.6 a `range` that suits NumPy >= 2.4."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def round_to_nearest_even(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)

    # The interpreter truncates fp32 -> bf16, and treats bf16 as an integer in other casts; a GPU rounds.
    def cast_impl(self: Any, source: Any, destination_type: Any) -> Any:
        data, target = source.data, destination_type.scalar
        if source.dtype.scalar == tl.bfloat16:
            data = widen(data)
        if target == tl.bfloat16:
            data = round_to_nearest_even(data.astype(np.float32))
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                data = data.astype(interpreter._get_np_dtype(destination_type))
        return interpreter.TensorHandle(data, target)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        patch_tensor = interpreter._patch_lang_tensor

        # Triton issue 9171: int() of a one-element array is an error since NumPy 2.4.
        def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = patch_tensor_with_index


if INTERPRETING:
    _repair_interpreter()
    watch_launches()
    # Memory is NaN (integers: the largest) until written: what a kernel leaves out is seen in its result.
    torch.use_deterministic_algorithms(True, warn_only=True)

_cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETING, reason="no GPU, or interpreting"),
    ],
)


@pytest.fixture(params=["cpu", _cuda])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the inputs are built: the CPU (twins or interpreter), or a GPU with `-m gpu`."""
    return torch.device(request.param)


@pytest.fixture
def canary() -> Iterator[Canary]:
    """A `Canary` whose margins are checked when the test ends."""
    guard = Canary()
    yield guard
    guard.check()
