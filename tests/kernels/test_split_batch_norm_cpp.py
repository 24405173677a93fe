"""Split BN in C++: against PyTorch's kernels; its sums, threads and eager function; where no compiler is."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exactness import Canary, GuardedAllocation, assert_as_accurate_as, channels_last
from torch import Tensor

from arat_fast.kernels import cpp_library, split_batch_norm_cpp
from arat_fast.kernels.cpp_library import SWITCH, library
from arat_fast.kernels.dispatch import INTERPRETING
from arat_fast.kernels.split_batch_norm import split_batch_norm, split_batch_norm_reference
from arat_fast.kernels.split_batch_norm_cpp import batch_backward_cpp, batch_forward_cpp, on_cpp
from arat_fast.kernels.split_batch_norm_cpu import batch_backward_cpu, batch_forward_cpu

OPS = torch.ops.arat_fast
EPS = 1e-5
# Images, channels, side; with 1 or 2 branches. Part of a vector, one, several; chunks of 512 rows and of few.
SHAPES = [(2, 1, 3), (4, 17, 5), (6, 64, 20), (4, 100, 11), (2, 640, 9)]

needs_cpp = pytest.mark.skipif(
    INTERPRETING or library("split_batch_norm") is None, reason="interpreting, or no C++ compiler"
)


def some(
    shape: tuple[int, int, int], branches: int, dtype: torch.dtype, mean: float = 0.5
) -> dict[str, Tensor]:
    n, c, side = shape
    g = torch.Generator().manual_seed(0)
    named = {
        name: channels_last(torch.randn(n, c, side, side, generator=g)).to(dtype)
        for name in ("dy", "second", "residual")
    }
    named["x"] = channels_last(torch.randn(n, c, side, side, generator=g) + mean).to(dtype)
    named["weight"] = torch.rand(branches, c, generator=g) + 0.5
    named["bias"] = torch.randn(branches, c, generator=g)
    return named


def wide(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_pytorchs_kernels(
    shape: tuple[int, int, int], branches: int, dtype: torch.dtype
) -> None:
    """Statistics, and gradients given the same output: each error at most twice that of PyTorch's kernels."""
    t = some(shape, branches, dtype)
    exact = wide(t)
    for residual in (None, "residual"):
        inputs = (t["x"], t["weight"], t["bias"], residual and t[residual], True, EPS)
        y, mean, var = batch_forward_cpp(*inputs)
        y_torch, mean_torch, var_torch = batch_forward_cpu(*inputs)
        y_exact, mean_exact, var_exact = split_batch_norm_reference(
            exact["x"],
            exact["weight"],
            exact["bias"],
            residual=residual and exact[residual],
            relu=True,
            eps=EPS,
        )
        # Backward reads one output, so that all close the same gates.
        found = batch_backward_cpp(
            t["dy"], None, t["x"], y, True, mean, var, t["weight"], t["bias"], True, EPS
        )
        theirs = batch_backward_cpu(t["dy"], y, t["x"], mean, var, t["weight"], EPS)
        ours = OPS.split_bn_batch_backward(
            *(v.double() for v in (t["dy"], t["x"], y)),
            True,
            *(v.double() for v in (mean, var, t["weight"], t["bias"])),
            True,
            EPS,
        )
        for a, b, c in (
            (y, y_torch, y_exact),
            (mean, mean_torch, mean_exact),
            (var, var_torch, var_exact),
            *zip(found, theirs, ours, strict=True),
        ):
            assert_as_accurate_as(a, b, c)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    t = some((8, 48, 32), 2, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, mean, var = batch_forward_cpp(t["x"], t["weight"], t["bias"], t["residual"], True, EPS)
            rest = (True, mean, var, t["weight"], t["bias"], True, EPS)
            results.append([y, mean, var, *batch_backward_cpp(t["dy"], t["second"], t["x"], y, *rest)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_found_from_x_is_the_outputs(dtype: torch.dtype) -> None:
    t = some((6, 80, 16), 2, dtype)
    y, mean, var = batch_forward_cpp(t["x"], t["weight"], t["bias"], None, True, EPS)
    rest = (True, mean, var, t["weight"], t["bias"], True, EPS)
    from_x = batch_backward_cpp(t["dy"], None, t["x"], None, *rest)
    from_y = batch_backward_cpp(t["dy"], None, t["x"], y, *rest)
    for a, b in zip(from_x, from_y, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@needs_cpp
def test_statistics_far_from_zero_and_chunks_that_begin_oddly() -> None:
    """A mean of 1000 standard deviations; chunks whose first rows, which shift them, are outliers."""
    x = channels_last(torch.randn(8, 20, 32, 32, generator=torch.Generator().manual_seed(0)))
    far = channels_last(x + 1000)
    odd = x.clone(memory_format=torch.preserve_format)
    odd[:, :, 0, :8] += 1e4
    weight, bias = torch.ones(1, 20), torch.zeros(1, 20)
    for value, rtol in ((far, 2e-5), (odd, 1e-4), (channels_last(torch.full_like(x, 3.7)), 0.0)):
        _, mean, var = batch_forward_cpp(value, weight, bias, None, False, EPS)
        exact = value.double().permute(1, 0, 2, 3).reshape(20, -1)
        error = (mean[0].double() - exact.mean(1)).abs()
        assert (error < 1e-5 * exact.std(1) + 1e-7 * exact.mean(1).abs()).all()
        torch.testing.assert_close(var[0].double(), exact.var(1, correction=0), rtol=rtol, atol=1e-9)


@needs_cpp
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_goes_where_pytorch_lets_it(dtype: torch.dtype, value: float) -> None:
    t = some((4, 20, 6), 2, dtype)
    t["x"][0, 3, 2, 2] = value
    t["dy"][3, 7, 1, 1] = value
    results = []
    for forward, backward in (
        (batch_forward_cpp, lambda y, m, v: batch_backward_cpp(
            t["dy"], None, t["x"], y, True, m, v, t["weight"], t["bias"], True, EPS)),
        (batch_forward_cpu, lambda y, m, v: batch_backward_cpu(t["dy"], y, t["x"], m, v, t["weight"], EPS)),
    ):  # fmt: skip
        y, mean, var = forward(t["x"], t["weight"], t["bias"], None, True, EPS)
        results.append([y, mean, var, *backward(y, mean, var)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())


@needs_cpp
def test_rounding_to_bf16_is_pytorchs() -> None:
    """Every bf16 value plus another: ties and what lies beside them, subnormal and not finite sums."""
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = torch.cat([(high | low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    # dy + second is rounded as an addition is; without a ReLU the kept gradient is that sum.
    dy = values.bfloat16()
    second = (values - dy.float()).bfloat16()
    shape = (6, 256, 16, 16)
    dy, second = (channels_last(v.view(shape)) for v in (dy, second))
    unit = torch.ones(1, 256)
    _, kept, _, _ = batch_backward_cpp(dy, second, dy, None, False, 0 * unit, unit, unit, 0 * unit, True, EPS)
    expected = dy + second
    assert kept is not None
    assert torch.equal(kept.isnan(), expected.isnan())
    assert torch.equal(kept.nan_to_num(0, 1, -1), expected.nan_to_num(0, 1, -1))


@needs_cpp
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_eager_function_is_the_op(with_residual: bool, relu: bool) -> None:
    t = some((4, 24, 6), 2, torch.float32)
    names = ("x", "weight", "bias", *(("residual",) if with_residual else ()))
    results = []
    for eager in (True, False):
        leaves = [t[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in names]
        x, weight, bias, *rest = leaves
        residual = rest[0] if rest else None
        if eager:
            y, mean, var = split_batch_norm(x, weight, bias, residual=residual, relu=relu)
            assert type(y.grad_fn).__name__ == "EagerSplitBatchNormBackward"
        else:
            y, _, mean, var = OPS.split_bn_batch(x, weight, bias, residual, relu, EPS)
        assert not mean.requires_grad
        gradients = torch.autograd.grad(y, leaves, t["dy"], create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves[:2])
        plain = torch.autograd.grad(
            (split_batch_norm if eager else OPS.split_bn_batch)(
                *leaves[:3], residual=residual, relu=relu, eps=EPS
            )[0],
            leaves,
            t["dy"],
        )
        results.append([y, mean, var, *gradients, *seconds, *plain])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cpp
def test_only_what_is_asked_for_is_differentiated() -> None:
    t = some((4, 16, 5), 1, torch.float32)
    x = t["x"].requires_grad_()
    y, _, _ = split_batch_norm(x, t["weight"], t["bias"], residual=t["residual"], relu=True)
    y.sum().backward()
    assert x.grad is not None
    assert t["residual"].grad is None
    assert t["weight"].grad is None
    with torch.no_grad():
        assert not split_batch_norm(x, t["weight"], t["bias"])[0].requires_grad


@needs_cpp
def test_default_dtype_and_device_do_not_matter(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    t = some((4, 48, 16), 2, torch.float32)
    expected = batch_forward_cpp(t["x"], t["weight"], t["bias"], None, True, EPS)
    monkeypatch.setattr(split_batch_norm_cpp, "torch", GuardedAllocation(canary))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = batch_forward_cpp(t["x"], t["weight"], t["bias"], None, True, EPS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.device("meta"):
        found = batch_forward_cpp(t["x"], t["weight"], t["bias"], None, True, EPS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_cpp
def test_functional_gradients() -> None:
    t = some((4, 16, 5), 2, torch.float32)

    def loss(x: Tensor) -> Tensor:
        y = split_batch_norm(x, t["weight"], t["bias"], residual=t["residual"], relu=True)[0]
        return (y * t["dy"]).sum()

    x = t["x"].clone(memory_format=torch.preserve_format).requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(t["x"]), expected)


# ---- where there is no library ----


@pytest.fixture
def fresh() -> Iterator[None]:
    """`library` asks again in this test, and afterwards; the interpreter never asks."""
    if INTERPRETING:
        pytest.skip("interpreting")
    for cached in (library, split_batch_norm_cpp._functions):
        cached.cache_clear()
    yield
    for cached in (library, split_batch_norm_cpp._functions):
        cached.cache_clear()


def _runs_without(caplog: pytest.LogCaptureFixture, said: str) -> None:
    t = some((2, 8, 4), 1, torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            y, _, _ = split_batch_norm(t["x"], t["weight"], t["bias"], relu=True)
    expected, _, _ = split_batch_norm_reference(t["x"], t["weight"], t["bias"], relu=True)
    torch.testing.assert_close(y, expected)
    assert not on_cpp(t["x"])
    messages = [record.getMessage() for record in caplog.records if "C++" in record.getMessage()]
    assert len(messages) == (1 if said else 0)
    assert all(said in message and SWITCH in message for message in messages)


def test_switched_off(fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(SWITCH, "0")
    _runs_without(caplog, "")


def test_without_a_compiler_pytorchs_kernels_run(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    _runs_without(caplog, "no C++ compiler")


def test_a_compiler_that_fails_is_said_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'out of cheese' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _runs_without(caplog, "out of cheese")
    assert not list((tmp_path / "cache" / "arat-fast").iterdir())


@needs_cpp
def test_a_folder_that_cannot_be_written_and_a_library_cut_short(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpp_library, "FLAGS", ("-std=c++17", "-O0", "-shared", "-fPIC", "-Wno-psabi"))
    (tmp_path / "blocked").write_text("a file where the folder should be")
    for name in ("blocked", "made"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        assert cpp_library._load("split_batch_norm") is not None
    (kept,) = (tmp_path / "made" / "arat-fast").iterdir()
    whole = kept.read_bytes()
    # Beside it, as what is loaded must not be cut.
    cut = tmp_path / "cut" / "arat-fast" / kept.name
    cut.parent.mkdir(parents=True)
    for length in (0, 1000, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert not cpp_library._is_whole(cut)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cut"))
    assert cpp_library._load("split_batch_norm") is not None
    assert cpp_library._is_whole(cut)
