"""What the compile-only check compiles: every kernel in every specialisation that the trainer launches.

Protocol. Each module named in KERNEL_MODULES has a function `compile_cases() -> Iterator[CompileCase]`. A
case holds what a launch would hold: the `@triton.jit` function (or an autotuner: all its configurations are
compiled), the positional arguments in the kernel's order, and the keyword arguments (constexprs, num_warps).
Give small real CPU tensors, aligned as torch allocates them: Triton specialises on the pointer's alignment
and on integers divisible by 16, so let sizes be as divisible as real ones.
`arat_fast.benchmarks.kernels` compiles them for each target in its own process, which never interprets.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KERNEL_MODULES = ("pgd", "pgd_l2", "random_start", "augment", "split_batch_norm", "multi_copy")

NVIDIA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD_TARGETS = ("gfx942",)
FP16_TARGETS = ("sm_75",)  # no bfloat16 arithmetic before sm_80
ALL_TARGETS = FP16_TARGETS + NVIDIA_TARGETS + AMD_TARGETS


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of one kernel.

    `load_bytes` is the width at which every activation stream must be read (the narrowest global load of the
    kernel that is not a scalar's); less than 16 is for kernels that gather bytes, None for kernels that read
    no stream. `bfloat16`: the kernel touches it, so it is not compiled for sm_75. `branchless`: a correctly
    rounded division or root is refused, as no load is moved across the branch to its slow path.
    """

    kernel: Any
    specialisation: str
    args: tuple[Any, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    load_bytes: int | None = 16
    bfloat16: bool = False
    branchless: bool = False

    @property
    def name(self) -> str:
        """The kernel function's name without its leading underscore."""
        kernel = self.kernel
        while not hasattr(kernel, "__name__"):  # an Autotuner or Heuristics wraps the function as .fn
            kernel = kernel.fn
        return str(kernel.__name__).lstrip("_")

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures to compile for; sm_75 only without bfloat16."""
        return ALL_TARGETS[len(FP16_TARGETS) :] if self.bfloat16 else ALL_TARGETS


def all_cases() -> Iterator[CompileCase]:
    """The cases of every kernel module, in order."""
    for name in KERNEL_MODULES:
        yield from importlib.import_module(f"{__package__}.{name}").compile_cases()
