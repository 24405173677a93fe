"""Many tensors copied onto others, or left alone, as a flag on the device says: one launch.

    targets[i] <- sources[i]  for every i, where flag is true

Not set, as in every good iteration, nothing of the tensors is read: each program looks at the flag and
ends. `torch.where` a tensor would be a launch each, 238 for a ResNet-18 with its momentum and statistics, and
three times the tensors' bytes.

A program reads its tensor's addresses from a table on the device, which is made anew where one has moved.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_cases import CompileCase
from .dispatch import check_device, check_same, check_tensor, on_device, use_triton

_BLOCK = 1024
_PROGRAMS = 16  # a tensor


def copy_where_reference(targets: Sequence[Tensor], sources: Sequence[Tensor], flag: Tensor) -> None:
    """The copies in plain PyTorch, one where a tensor."""
    for target, source in zip(targets, sources, strict=True):
        torch.where(flag, source, target, out=target)


@triton.jit
def _copy_where_kernel(flag, table, count, BLOCK: tl.constexpr):
    if tl.load(flag) != 0:
        tensor = tl.program_id(0)
        target = tl.load(table + tensor).to(tl.pointer_type(tl.uint8))
        source = tl.load(table + count + tensor).to(tl.pointer_type(tl.uint8))
        size = tl.load(table + 2 * count + tensor)
        start = tl.program_id(1).to(tl.int64) * BLOCK
        while start < size:
            lane = start + tl.arange(0, BLOCK)
            tl.store(target + lane, tl.load(source + lane, mask=lane < size), mask=lane < size)
            start += tl.num_programs(1) * BLOCK


@torch.library.custom_op("arat_fast::copy_where_", mutates_args={"targets"})
def _copy_where(
    targets: Sequence[Tensor], sources: Sequence[Tensor], flag: Tensor, table: Tensor | None
) -> None:
    if table is not None:
        grid = (table.shape[1], _PROGRAMS)
        with on_device(flag):
            _copy_where_kernel[grid](flag.view(torch.uint8), table, table.shape[1], BLOCK=_BLOCK, num_warps=4)
    elif flag:  # a CPU's: nothing waits
        torch._foreach_copy_(list(targets), list(sources))


@_copy_where.register_fake
def _(targets: Sequence[Tensor], sources: Sequence[Tensor], flag: Tensor, table: Tensor | None) -> None:
    return None


class CopyWhere:
    """`copy = CopyWhere(targets, sources)`, then `copy(flag)`: every target becomes its source where the flag
    is true.

    targets, sources: tensors of any dtypes on one device, in pairs of one shape, dtype and dense layout
    (`source = torch.empty_like(target)`). A captured CUDA graph holds them by address. flag: 0-d bool on that
    device; the host does not wait for it.

    Raises TypeError or ValueError for tensors that do not fit together, or are not dense.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if len(targets) != len(sources) or not targets:
            raise ValueError(
                f"{len(targets)} targets and {len(sources)} sources; expected as many, at least one"
            )
        for k, (target, source) in enumerate(zip(targets, sources, strict=True)):
            check_tensor(f"sources[{k}]", source, (target.dtype,))
            check_same(f"sources[{k}]", source, f"targets[{k}]", target)
            check_device(f"targets[{k}]", target, "targets[0]", targets[0])
            dense = torch.ops.aten.is_non_overlapping_and_dense(target)
            if not dense or target.stride() != source.stride():
                raise ValueError(
                    f"targets[{k}] has strides {target.stride()} and sources[{k}] {source.stride()}; "
                    "expected dense tensors of one layout"
                )
        self.targets, self.sources = list(targets), list(sources)
        self._addresses: list[list[int]] = []
        self.table: Tensor | None = None
        self._look_up()

    def _look_up(self) -> None:
        """Make the table of addresses, anew where a tensor has moved since."""
        if not use_triton(self.targets[0]):
            return
        addresses = [[t.data_ptr() for t in side] for side in (self.targets, self.sources)]
        if addresses != self._addresses:
            sizes = [t.numel() * t.element_size() for t in self.targets]
            table = torch.tensor([*addresses, sizes], dtype=torch.int64)
            self._addresses, self.table = addresses, table.to(self.targets[0].device)

    def __call__(self, flag: Tensor) -> None:
        """Copy where the 0-d bool flag is true."""
        check_tensor("flag", flag, (torch.bool,), ndim=0)
        check_device("flag", flag, "targets[0]", self.targets[0])
        self._look_up()
        _copy_where(self.targets, self.sources, flag, self.table)


def compile_cases() -> Iterator[CompileCase]:
    """The one kernel; its loads of a byte a lane happen after a failure only."""
    flag, table = torch.zeros((), dtype=torch.uint8), torch.zeros((3, 16), dtype=torch.int64)
    yield CompileCase(
        _copy_where_kernel,
        "any dtypes",
        (flag, table, 16),
        {"BLOCK": _BLOCK, "num_warps": 4},
        load_bytes=None,
    )
