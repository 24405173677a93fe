"""The backward of a sum of two gradients, held against an addition and the backward of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import Canary, GuardedAllocation, channels_last
from torch import Tensor

from arat_fast.kernels import split_batch_norm_cpp
from arat_fast.kernels import split_batch_norm_launch as launch
from arat_fast.kernels.cpp_library import library
from arat_fast.kernels.dispatch import use_triton
from arat_fast.kernels.split_batch_norm_cpp import on_cpp
from arat_fast.kernels.split_batch_norm_joined import joined_backward_reference

OPS = torch.ops.arat_fast
# Images of both branches, channels, side: whole tiles, channels that divide nothing, several columns.
SHAPES = [(4, 64, 6), (6, 17, 5), (2, 3, 7), (2, 96, 4)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(SHAPES[1], dtype) for dtype in (torch.float16, torch.float64)]


def arguments_of(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, relu: bool, residual: bool
) -> list[Any]:
    """What the op takes, of a forward with batch statistics."""
    images, channels, side = shape
    g = torch.Generator().manual_seed(0)

    def image() -> Tensor:
        return channels_last(torch.randn(images, channels, side, side, generator=g)).to(device, dtype)

    x, r, dy, second = (image() for _ in range(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = ((torch.rand(2, channels, generator=g) + 0.5).to(device, wide) for _ in range(2))
    y, bits, mean, var = OPS.split_bn_batch(x, weight, bias, r if residual else None, relu, 1e-5)
    gate = None
    if relu:
        packed = use_triton(x) and dtype != torch.float64
        gate = bits if packed and residual else y if residual or not (packed or on_cpp(x)) else None
    return [dy, second, x, gate, relu, mean, var, weight, bias, relu and residual, 1e-5]


@pytest.mark.parametrize("small_bytes", [0, launch.SMALL_BYTES])
@pytest.mark.parametrize(("relu", "residual"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_is_the_backward_of_the_sum(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    relu: bool,
    residual: bool,
    small_bytes: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "SMALL_BYTES", small_bytes)
    arguments = arguments_of(shape, dtype, device, relu, residual)
    found = OPS.split_bn_joined_backward(*arguments)
    expected = joined_backward_reference(*arguments)
    names = ("dx", "g", "dweight", "dbias")
    for name, one, other in zip(names, found, expected, strict=True):
        if device.type == "cpu" or name == "g":
            assert torch.equal(one, other), name
        else:  # another kernel may round a product and its sum once or twice
            torch.testing.assert_close(one, other, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("relu", [True, False])
def test_opcheck(relu: bool, device: torch.device) -> None:
    arguments = arguments_of((4, 16, 5), torch.float32, device, relu, True)
    torch.library.opcheck(OPS.split_bn_joined_backward, tuple(arguments))


@pytest.mark.parametrize("where", [0, 1])
def test_not_a_number_of_either_gradient_gets_through(where: int, device: torch.device) -> None:
    arguments = arguments_of((4, 16, 5), torch.float32, device, False, False)
    arguments[where][0, 3, 1, 2] = torch.nan
    dx, _, dweight, dbias = OPS.split_bn_joined_backward(*arguments)
    for of_channel in (dx[:2, 3], dweight[0, 3], dbias[0, 3]):
        assert of_channel.isnan().all()
    assert not dx[2:].isnan().any()
    assert not dx[:, :3].isnan().any()


@pytest.mark.parametrize("small_bytes", [0, launch.SMALL_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_out_of_bounds(
    dtype: torch.dtype,
    small_bytes: int,
    device: torch.device,
    canary: Canary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not use_triton(torch.empty(0, device=device)) and (small_bytes or library("split_batch_norm") is None):
        pytest.skip("the CPU has one path" if small_bytes else "PyTorch's own kernels run on the CPU")

    monkeypatch.setattr(launch, "SMALL_BYTES", small_bytes)
    for module in (launch, split_batch_norm_cpp):
        monkeypatch.setattr(module, "torch", GuardedAllocation(canary))
    for channels in (3, 17, 80):
        for residual in (True, False):
            arguments = arguments_of((6, channels, 7), dtype, device, True, residual)
            OPS.split_bn_joined_backward(*(canary.like(a) if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.double(), TypeError, "second is float64"),
        (lambda t: t[:2], ValueError, "second has shape .* the shape of dy"),
        (lambda t: t.contiguous(), ValueError, "second has shape .* strides .* channels-last"),
    ],
)
def test_refuses_a_gradient_that_is_not_like_the_first(
    change: Callable[[Tensor], Tensor], error: type[Exception], says: str, device: torch.device
) -> None:
    arguments = arguments_of((4, 16, 5), torch.float32, device, True, True)
    arguments[1] = change(arguments[1])
    with pytest.raises(error, match=says):
        OPS.split_bn_joined_backward(*arguments)
