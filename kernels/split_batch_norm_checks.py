"""What the split-BN ops accept: checked at each op's entry, real tensors and fake ones alike."""

import torch
from torch import Tensor

from .dispatch import FLOAT_DTYPES, check_channels_last, check_device, check_same, check_tensor

__all__ = [
    "check_activation",
    "check_apply",
    "check_backward",
    "check_batch",
    "check_input_gradient",
    "check_rows",
]


def check_activation(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """A 4-d channels-last float tensor; with `like`, of its dtype, shape and device."""
    check_tensor(name, value, (*FLOAT_DTYPES, torch.float64) if like is None else (like.dtype,), ndim=4)
    if like is not None:
        check_same(name, value, "x", like)
    check_channels_last(name, value)


def check_rows(x: Tensor, branches: int) -> None:
    """The batch is not empty and divides into the branches' equal parts."""
    if branches < 1:
        raise ValueError(f"branches is {branches}; expected at least 1")
    if x.shape[0] % branches or x.shape[0] == 0:
        raise ValueError(
            f"x has a batch of {x.shape[0]}; expected a positive multiple of {branches}: "
            "the branches' equal parts in order"
        )


def check_parameters(x: Tensor, x_name: str = "x", **tensors: Tensor | None) -> None:
    """Every tensor is (branches, C) in the precision of the statistics, on x's device."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    branches = None
    for name, value in tensors.items():
        if value is None:
            continue
        check_tensor(name, value, (dtype,), ndim=2)
        if branches is None:
            branches = value.shape[0]
        if tuple(value.shape) != (branches, x.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected {(branches, x.shape[1])}: "
                f"branches by the channels of {x_name}"
            )
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous tensor")
        check_device(name, value, x_name, x)
    if branches is not None:
        check_rows(x, branches)


def check_batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Arguments of the fused forward; one value a channel has no variance."""
    check_activation("x", x)
    if residual is not None:
        check_activation("residual", residual, x)
    check_parameters(x, weight=weight, bias=bias)
    if x.numel() == weight.numel():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, one value a channel and branch; "
            "expected more: batch statistics need a variance"
        )


def check_gate(gate: Tensor | None, dy: Tensor) -> None:
    if gate is None:
        return
    if gate.dtype == dy.dtype:
        check_activation("gate", gate, dy)
        return
    check_tensor("gate", gate, (torch.uint8, dy.dtype))
    n, c, h, w = dy.shape
    if tuple(gate.shape) != (n * h * w, (c + 7) // 8) or not gate.is_contiguous():
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; expected {(n * h * w, (c + 7) // 8)}, contiguous, "
            "a bit an element"
        )
    check_device("gate", gate, "dy", dy)


def check_backward(
    dy: Tensor, x: Tensor | None, gate: Tensor | None, relu: bool, **parameters: Tensor | None
) -> None:
    """Arguments that the backward ops share."""
    check_activation("dy", dy)
    if x is not None:
        check_tensor("x", x, (dy.dtype,), ndim=4)
        check_same("dy", dy, "x", x)
        check_channels_last("x", x)
    if relu:
        check_gate(gate, dy)
    check_parameters(dy, "dy", **parameters)


def check_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> None:
    """Arguments of apply: statistics given."""
    check_activation("x", x)
    if residual is not None:
        check_activation("residual", residual, x)
    check_parameters(x, weight=weight, bias=bias, mean=mean, var=var)


def check_input_gradient(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor | None,
    sum_gxhat: Tensor | None,
) -> None:
    """Arguments of the input gradient: with both sums or neither, x where it is read."""
    if (sum_g is None) != (sum_gxhat is None):
        raise ValueError(
            "sum_g and sum_gxhat: expected both (batch statistics) or neither (constant statistics)"
        )
    if x is None and (sum_g is not None or (relu and gate is None)):
        raise ValueError(
            "x is None; expected the layer's input where sums are given or the gate is found again from it"
        )
    check_backward(
        dy, x, gate, relu, weight=weight, bias=bias, mean=mean, var=var, sum_g=sum_g, sum_gxhat=sum_gxhat
    )
