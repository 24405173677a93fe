"""The checks that every interpreted launch passes are seen to fail on kernels that are wrong."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from launch_checks import LaunchError
from triton.runtime.errors import InterpreterError

from arat_fast.kernels.dispatch import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="checks of interpreted launches")

SIZE = 64


@triton.jit
def _next_block(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + lane, tl.load(x + (lane + BLOCK) % (2 * BLOCK)))


@triton.jit
def _one_element(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.load(x + tl.program_id(0)))


@triton.jit
def _reads_back(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane, tl.load(x + lane))
    tl.store(x + lane, tl.load(y + lane + 1, mask=lane % BLOCK < BLOCK - 1))


@triton.jit
def _lanes_collide(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane // 2, tl.load(x + lane))


@triton.jit
def _past_the_end(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane, tl.load(x + lane + 1))


@triton.jit
def _before_the_start(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lane - 1, tl.load(x + lane))


@triton.jit
def _adds(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


@triton.jit
def _in_place(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + lane, tl.load(x + lane) + tl.load(y))  # every program reads y: no one writes it


WRONG: list[tuple[Any, str]] = [
    (_next_block, "reads what another one writes"),
    (_one_element, "two programs write one element"),
    (_reads_back, "program 0 reads back what it wrote"),
    (_lanes_collide, "two lanes of one store write different values"),
    (_past_the_end, "program 1 reads 1 elements of 4 bytes outside its tensors"),
    (_before_the_start, "program 0 writes 1 elements of 4 bytes outside its tensors"),
    (_adds, "atomics"),
]


@pytest.mark.parametrize(("kernel", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_kernels_are_refused(kernel: Callable[..., Any], message: str) -> None:
    inside = torch.arange(2.0 * SIZE)  # neighbours in memory: only the tensor's own extent counts
    x, y = inside[SIZE // 2 : -SIZE // 2], torch.zeros(SIZE)
    with pytest.raises((LaunchError, InterpreterError), match=message):
        kernel[(2,)](x, y, BLOCK=SIZE // 2)


def test_in_place_and_what_all_read_is_allowed() -> None:
    x = torch.arange(float(SIZE))
    _in_place[(2,)](x, torch.ones(1), BLOCK=SIZE // 2)
    assert torch.equal(x, torch.arange(float(SIZE)) + 1)


def test_equal_values_of_two_lanes_are_allowed() -> None:
    y = torch.zeros(SIZE)
    _lanes_collide[(1,)](torch.ones(SIZE), y, BLOCK=SIZE)
    assert torch.equal(y[: SIZE // 2], torch.ones(SIZE // 2))


def test_memory_is_nan_until_it_is_written() -> None:
    assert torch.empty(SIZE).isnan().all()
