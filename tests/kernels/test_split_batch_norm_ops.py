"""The registered ops of split BN: schemas and fakes, derivatives, composition, compilation, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import Canary, GuardedAllocation, channels_last, compiled_only, relative_error
from torch import Tensor

from arat_fast.kernels import split_batch_norm_cpp
from arat_fast.kernels import split_batch_norm_launch as launch
from arat_fast.kernels.cpp_library import library
from arat_fast.kernels.dispatch import INTERPRETING, use_triton
from arat_fast.kernels.split_batch_norm import (
    batch_norm_apply,
    batch_norm_input_gradient,
    batch_norm_reduce,
    batch_norm_statistics,
    split_batch_norm,
    split_batch_norm_reference,
)
from arat_fast.kernels.split_batch_norm_reference import apply_reference, pack_bits, unpack_bits

OPS = torch.ops.arat_fast


def tensors(
    device: torch.device, *, dtype: torch.dtype = torch.float32, n: int = 4, c: int = 6, size: int = 5
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def image() -> Tensor:
        return channels_last(torch.randn(n, c, size, size, generator=g, dtype=torch.float64)).to(
            device, dtype
        )

    def row() -> Tensor:
        return (torch.rand(2, c, generator=g, dtype=torch.float64) + 0.5).to(device, wide)

    named = {name: image() for name in ("x", "residual", "dy")}
    return named | {name: row() for name in ("weight", "bias", "mean", "var", "sum_g", "sum_gxhat")}


def gate_of(t: dict[str, Tensor]) -> Tensor:
    y, bits = batch_norm_apply(t["x"], t["mean"], t["var"], t["weight"], t["bias"], t["residual"], True)
    return bits if bits.numel() else y


def op_samples(device: torch.device) -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    t = tensors(device)
    gate = gate_of(t)
    leaf = {
        name: value.clone(memory_format=torch.preserve_format).requires_grad_() for name, value in t.items()
    }
    x, r, dy, w, b = (leaf[name] for name in ("x", "residual", "dy", "weight", "bias"))
    mean, var, sum_g, sum_gxhat = (t[name] for name in ("mean", "var", "sum_g", "sum_gxhat"))
    stats = (mean, var, t["weight"], t["bias"])
    return {
        "split_bn_statistics": [(OPS.split_bn_statistics, (t["x"], 2))],
        "split_bn_apply": [
            (OPS.split_bn_apply, (x, mean, var, w, b, residual, relu, 1e-5))
            for residual in (None, r)
            for relu in (False, True)
        ],
        "split_bn_reduce": [
            (OPS.split_bn_reduce, (dy, x, g, g is not None, *stats, 1e-5)) for g in (None, gate)
        ],
        "split_bn_input_gradient": [
            (
                OPS.split_bn_input_gradient,
                (dy, None, gate, True, mean, var, w, b, None, None, 0.0, True, 1e-5),
            ),
            (
                OPS.split_bn_input_gradient,
                (dy, None, None, False, mean, var, w, b, None, None, 0.0, False, 1e-5),
            ),
            (
                OPS.split_bn_input_gradient,
                (t["dy"], t["x"], gate, True, *stats, sum_g, sum_gxhat, 0.02, True, 1e-5),
            ),
        ],
        "split_bn_batch": [
            (OPS.split_bn_batch, (x, w, b, residual, relu, 1e-5))
            for residual in (None, r)
            for relu in (False, True)
        ],
        "split_bn_batch_backward": [
            (OPS.split_bn_batch_backward, (t["dy"], t["x"], g, g is not None, *stats, True, 1e-5))
            for g in (None, gate)
        ],
    }


@pytest.mark.parametrize(
    "name",
    ["statistics", "apply", "reduce", "input_gradient", "batch", "batch_backward"],
)
def test_opcheck(name: str, device: torch.device) -> None:
    for op, arguments in op_samples(device)[f"split_bn_{name}"]:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("function", [split_batch_norm_reference, split_batch_norm])
def test_gradcheck_twice(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]], relu: bool, batch: bool
) -> None:
    """First and second derivatives in float64, of the twin and of the op, batch and running statistics."""
    t = tensors(torch.device("cpu"), dtype=torch.float64, n=6, c=2, size=1)
    running = {} if batch else {"running_mean": t["mean"], "running_var": t["var"]}

    def y(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        # gradcheck perturbs contiguous copies; the op asks for channels-last
        return function(
            channels_last(x), weight, bias, residual=channels_last(residual), relu=relu, **running
        )[0]

    inputs = tuple(t[name].requires_grad_() for name in ("x", "weight", "bias", "residual"))
    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_second_derivative_of_the_input_gradient(residual: bool, batch: bool, device: torch.device) -> None:
    """What EMR takes: Σ (∂s/∂x)², differentiated in the parameters and x, in fp32 on every path."""
    t = tensors(device)
    running = {} if batch else {"running_mean": t["mean"], "running_var": t["var"]}

    def emr(function: Callable[..., Any], t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias, r = (
            t[name].clone(memory_format=torch.preserve_format).requires_grad_()
            for name in ("x", "weight", "bias", "residual")
        )
        extra = {k: v.to(x.dtype) for k, v in running.items()}
        y = function(x, weight, bias, residual=r if residual else None, relu=True, **extra)[0]
        (g,) = torch.autograd.grad((y * y * t["dy"]).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, weight, bias))

    ours = emr(split_batch_norm, t)
    exact = emr(split_batch_norm_reference, {name: value.double() for name, value in t.items()})
    for a, e in zip(ours, exact, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("small_bytes", [0, launch.SMALL_BYTES])
def test_four_ops_compose_to_the_fused_one(
    relu: bool, small_bytes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SMALL_BYTES", small_bytes)
    t = tensors(device, c=16)
    leaves = [
        t[n].clone(memory_format=torch.preserve_format).requires_grad_()
        for n in ("x", "weight", "bias", "residual")
    ]
    y, mean, var = split_batch_norm(*leaves[:3], residual=leaves[3], relu=relu)
    expected = torch.autograd.grad(y, leaves, t["dy"])

    mean_, var_ = batch_norm_statistics(t["x"], 2)
    y_, bits = batch_norm_apply(t["x"], mean_, var_, t["weight"], t["bias"], t["residual"], relu)
    gate = (bits if bits.numel() else y_) if relu else None
    statistics = (mean_, var_, t["weight"], t["bias"])
    sum_g, sum_gxhat = batch_norm_reduce(t["dy"], t["x"], gate, relu, *statistics)
    dx, dresidual = batch_norm_input_gradient(
        t["dy"], t["x"], gate, relu, *statistics, sum_g, sum_gxhat, 1 / (2 * 5 * 5), True
    )
    pairs = [(y_, y), (mean_, mean), (var_, var)]
    pairs += list(zip((dx, sum_gxhat, sum_g, dresidual), expected, strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_two_ranks_compose_to_one(device: torch.device) -> None:
    """Synchronised BN: with an all-reduce between the ops, two ranks of [clean; adv] equal one of twice the batch."""
    t = tensors(device, c=16, n=8)
    leaves = [
        t[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in ("x", "weight", "bias")
    ]
    y, mean, var = split_batch_norm(*leaves, relu=True)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, t["dy"])

    def of_rank(tensor: Tensor, rank: int) -> Tensor:  # of the branch's four images, two a rank
        return channels_last(torch.cat([tensor[2 * rank :][:2], tensor[4 + 2 * rank :][:2]]))

    x, dy = ([of_rank(t[name], rank) for rank in (0, 1)] for name in ("x", "dy"))
    means, variances = zip(*(batch_norm_statistics(part, 2) for part in x), strict=True)
    centre = (means[0] + means[1]) / 2
    spread = sum(v + (m - centre).square() for m, v in zip(means, variances, strict=True)) / 2
    torch.testing.assert_close(centre, mean)
    torch.testing.assert_close(spread, var)
    statistics = (centre, spread, t["weight"], t["bias"])
    outputs = [batch_norm_apply(part, *statistics, None, True) for part in x]
    gates = [bits if bits.numel() else y_ for y_, bits in outputs]
    sums = [
        batch_norm_reduce(dy_, x_, gate, True, *statistics)
        for dy_, x_, gate in zip(dy, x, gates, strict=True)
    ]
    sum_g, sum_gxhat = sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
    torch.testing.assert_close(sum_g, dbias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum_gxhat, dweight, rtol=1e-4, atol=1e-5)
    for rank in (0, 1):
        found, _ = batch_norm_input_gradient(
            dy[rank], x[rank], gates[rank], True, *statistics, sum_g, sum_gxhat, 1 / (4 * 5 * 5)
        )
        torch.testing.assert_close(outputs[rank][0], of_rank(y, rank), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, of_rank(dx, rank), rtol=1e-4, atol=1e-5)


def test_bits_are_the_twins(device: torch.device) -> None:
    if not use_triton(torch.empty(0, device=device)):
        pytest.skip("the CPU saves no bits")
    for c in (3, 16, 17, 64):
        t = tensors(device, c=c)
        arguments = (t["x"], t["mean"], t["var"], t["weight"], t["bias"], t["residual"], True)
        _, bits = batch_norm_apply(*arguments)
        _, expected = apply_reference(*arguments, 1e-5)
        assert expected is not None
        assert torch.equal(bits, expected)


def test_pack_bits() -> None:
    mask = torch.rand(7, 19, generator=torch.Generator().manual_seed(0)) > 0.5
    bits = pack_bits(mask)
    assert bits.shape == (7, 3)
    assert bits[2, 1] == sum(int(mask[2, 8 + k]) << k for k in range(8))
    assert torch.equal(unpack_bits(bits, 19), mask)


@pytest.mark.parametrize("small_bytes", [0, launch.SMALL_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_out_of_bounds(
    dtype: torch.dtype,
    small_bytes: int,
    device: torch.device,
    canary: Canary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs and outputs lie between margins; shapes whose last tile is not full, in rows and in channels."""
    if not use_triton(torch.empty(0, device=device)) and (small_bytes or library("split_batch_norm") is None):
        pytest.skip("the CPU has one path" if small_bytes else "PyTorch's own kernels run on the CPU")

    monkeypatch.setattr(launch, "SMALL_BYTES", small_bytes)
    for module in (launch, split_batch_norm_cpp):
        monkeypatch.setattr(module, "torch", GuardedAllocation(canary))
    for c in (3, 17, 80):
        t = {
            name: canary.like(value) for name, value in tensors(device, dtype=dtype, c=c, n=6, size=7).items()
        }
        for residual, batch in itertools.product((None, t["residual"]), (True, False)):
            x = t["x"].detach().requires_grad_()
            running = {} if batch else {"running_mean": t["mean"], "running_var": t["var"]}
            y, _, _ = split_batch_norm(x, t["weight"], t["bias"], residual=residual, relu=True, **running)
            torch.autograd.grad(y, x, t["dy"])


@compiled_only
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype: torch.dtype, batch: bool, device: torch.device) -> None:
    """Forward and backward between pointwise operations and a mean over pixels; channels-last in and out."""
    t = tensors(device, dtype=dtype, c=16)
    running = {} if batch else {"running_mean": t["mean"], "running_var": t["var"]}

    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, _ = split_batch_norm(x * 2, weight, bias, residual=residual, relu=True, **running)
        return y, y.float().mean((2, 3)).square().sum(), mean

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=False)):
        leaves = [
            t[n].clone(memory_format=torch.preserve_format).requires_grad_()
            for n in ("x", "weight", "bias", "residual")
        ]
        y, loss, mean = function(*leaves)
        assert y.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(loss, leaves)
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)
        results.append((y, loss, mean, *gradients))
    for a, b in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@compiled_only
def test_the_attack_inside_a_compiled_step(device: torch.device) -> None:
    """An input gradient taken inside the graph, and its square differentiated again (EMR)."""
    t = tensors(device, c=8)
    running = {"running_mean": t["mean"], "running_var": t["var"]}
    zero = torch.zeros_like(t["x"]).requires_grad_()

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        inside = x.detach() + zero
        y, _, _ = split_batch_norm(inside, weight, t["bias"], relu=True, **running)
        (g,) = torch.autograd.grad(y.square().sum(), zero, create_graph=True)
        return g.square().sum()

    weight = t["weight"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(penalty(t["x"], weight), weight)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, fullgraph=True, dynamic=False)
        (found,) = torch.autograd.grad(compiled(t["x"], weight), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_the_dtypes_alone(device: torch.device) -> None:
    t = tensors(device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, mean, var = split_batch_norm(t["x"], t["weight"], t["bias"], residual=t["residual"], relu=True)
    assert (y.dtype, mean.dtype, var.dtype) == (torch.bfloat16, torch.float32, torch.float32)


# ruff: noqa: E501
BAD: dict[str, tuple[type[Exception], str, Callable[[dict[str, Tensor]], dict[str, Any]]]] = {
    "integers": (TypeError, "x is int64", lambda t: {"x": t["x"].long()}),
    "not a 4-d tensor": (ValueError, "x has shape", lambda t: {"x": t["x"][0]}),
    "NCHW": (ValueError, "x has shape .* strides .* channels-last", lambda t: {"x": t["x"].contiguous()}),
    "every other channel": (ValueError, "x has shape .* strides", lambda t: {"x": torch.cat([t["x"]] * 2, 1)[:, ::2]}),
    "odd batch": (ValueError, "x has a batch of 3; expected a positive multiple of 2", lambda t: {"x": t["x"][:3]}),
    "empty batch": (ValueError, "x has a batch of 0", lambda t: {"x": t["x"][:0]}),
    "channels": (ValueError, "weight has shape", lambda t: {"weight": t["weight"][:, :5].contiguous()}),
    "bias of one branch": (ValueError, "bias has shape", lambda t: {"bias": t["bias"][:1]}),
    "weight not stacked": (ValueError, "weight has shape", lambda t: {"weight": t["weight"][0]}),
    "weight strided": (ValueError, "weight has strides", lambda t: {"weight": t["weight"].t().contiguous().t()}),
    "half weight": (TypeError, "weight is bfloat16; expected float32", lambda t: {"weight": t["weight"].bfloat16()}),
    "residual dtype": (TypeError, "residual is bfloat16", lambda t: {"residual": t["residual"].bfloat16()}),
    "residual shape": (ValueError, "residual has shape", lambda t: {"residual": t["residual"][:2]}),
    "residual NCHW": (ValueError, "residual has shape", lambda t: {"residual": t["residual"].contiguous()}),
    "one running": (ValueError, "running_mean and running_var", lambda t: {"running_mean": t["mean"]}),
    "running shape": (
        ValueError,
        "mean has shape",
        lambda t: {"running_mean": t["mean"][:1], "running_var": t["var"]},
    ),
    "no variance": (ValueError, "one value a channel", lambda t: {"x": t["x"][:2, :, :1, :1].clone(memory_format=torch.channels_last), "residual": None}),
    "other device": (ValueError, "weight is on meta", lambda t: {"weight": t["weight"].to("meta")}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, device: torch.device) -> None:
    error, message, change = BAD[name]
    t = tensors(device)
    arguments: dict[str, Any] = {n: t[n] for n in ("x", "weight", "bias")} | change(t)
    with pytest.raises(error, match=message):
        split_batch_norm(**arguments)


def test_bad_gradients_are_named(device: torch.device) -> None:
    t = tensors(device)
    statistics = (t["mean"], t["var"], t["weight"], t["bias"])
    with pytest.raises(ValueError, match=r"dy has shape .* strides"):
        batch_norm_reduce(t["dy"].contiguous(), t["x"], None, False, *statistics)
    with pytest.raises(TypeError, match="x is bfloat16"):
        batch_norm_reduce(t["dy"], t["x"].bfloat16(), None, False, *statistics)
    with pytest.raises(ValueError, match="gate has shape"):
        batch_norm_reduce(
            t["dy"], t["x"], torch.zeros(3, 1, dtype=torch.uint8, device=device), True, *statistics
        )
    with pytest.raises(ValueError, match="sum_g and sum_gxhat"):
        batch_norm_input_gradient(t["dy"], t["x"], None, False, *statistics, t["sum_g"], None, 0.1)
    with pytest.raises(ValueError, match="x is None"):
        batch_norm_input_gradient(t["dy"], None, None, True, *statistics, None, None, 0.1)
    with pytest.raises(ValueError, match="branches is 0"):
        batch_norm_statistics(t["x"], 0)


def test_kernels_take_every_compile_case() -> None:
    """The cases that are compiled for other GPUs are what the launchers launch, each once."""
    if INTERPRETING:
        pytest.skip("interpreted functions are no compile cases")
    from arat_fast.kernels.split_batch_norm import compile_cases

    cases = list(compile_cases())
    assert {case.name for case in cases} >= {"apply_kernel", "input_gradient_kernel", "small_backward_kernel"}
    assert len({(case.name, case.specialisation, len(case.args)) for case in cases}) == len(cases)
    assert any(case.load_bytes == 16 and case.bfloat16 for case in cases)
