"""What the compile-only check compiles of split BN: the launches recorded from the launchers themselves."""

from collections.abc import Iterator

import torch

from . import split_batch_norm_launch as launch
from .compile_cases import CompileCase

__all__ = ["cases"]

# (images, channels, height): a large layer, one whose channels 64 does not divide, the widest small one, the
# stem of a WideResNet, and odd channels, which cannot be read 16 bytes at a time.
LAYERS = ((256, 64, 32), (256, 160, 32), (256, 512, 4), (256, 16, 32), (256, 17, 9))
STREAMING = {
    "statistics_partial_kernel",
    "apply_kernel",
    "reduce_partial_kernel",
    "input_gradient_kernel",
    "small_forward_kernel",
    "small_backward_kernel",
}


def _recorded(
    dtype: torch.dtype, images: int, channels: int, height: int, branches: int
) -> Iterator[launch.Launch]:
    x = torch.empty((images, channels, height, height), dtype=dtype, memory_format=torch.channels_last)
    p = torch.empty(branches, channels)
    bits = torch.empty((images * height * height, -(-channels // 8)), dtype=torch.uint8)
    eps = 1e-5
    # One flag combination tells the load width of the other layers; all would be minutes of compiling.
    flags = (False, True) if channels in (64, 512) else (True,)
    for residual in [x if flag else None for flag in flags]:
        for relu in flags:
            has = residual is not None
            yield from launch.record(launch.batch_forward_triton, x, p, p, residual, relu, relu and has, eps)
            # Running statistics: the bits are saved whether or not there is a residual.
            yield from launch.record(launch.apply_triton, x, p, p, p, p, residual, relu, relu, eps)
            gate = bits if relu and has else None
            yield from launch.record(
                launch.batch_backward_triton, x, x, gate, relu, p, p, p, p, relu and has, eps
            )
            if relu:  # two gradients meet behind a block's ReLU
                yield from launch.record(
                    launch.batch_backward_triton, x, x, gate, True, p, p, p, p, has, eps, second=x
                )
            gate = bits if relu else None
            yield from launch.record(
                launch.input_gradient_triton,
                x,
                None,
                gate,
                relu,
                p,
                p,
                p,
                p,
                None,
                None,
                0.0,
                relu and has,
                eps,
            )
            yield from launch.record(launch.reduce_triton, x, x, gate, relu, p, p, p, p, eps)


def cases() -> Iterator[CompileCase]:
    """Each launch once: by dtype and layer, residual and ReLU or not, batch and running statistics."""
    seen = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for images, channels, height in LAYERS:
            for branches in (1, 2):
                for kernel, args, meta in _recorded(dtype, images, channels, height, branches):
                    shape = f"C {channels}, {height} x {height}"
                    flags = ", ".join(f"{key} {value}" for key, value in meta.items())
                    # 1 is a specialisation of its own; other numbers count by being divisible by 16.
                    numbers = tuple(a if a == 1 else a % 16 == 0 for a in args if isinstance(a, int))
                    dtypes = tuple(a.dtype for a in args if isinstance(a, torch.Tensor))
                    key = (kernel.fn.__name__, flags, numbers, dtypes)
                    if key in seen:
                        continue
                    seen.add(key)
                    wide = kernel.fn.__name__ in STREAMING and channels % 16 == 0
                    yield CompileCase(
                        kernel,
                        f"{name}, {shape}, {flags}",
                        args,
                        meta,
                        load_bytes=16 if wide else None,
                        bfloat16=dtype == torch.bfloat16,
                        branchless=True,
                    )
