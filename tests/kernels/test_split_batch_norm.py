"""Split BN held against float64: values, statistics and gradients, on the CPU, interpreted, on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_accurate_as, channels_last, gpu_only
from torch import Tensor

from arat_fast.kernels import split_batch_norm_cpp
from arat_fast.kernels import split_batch_norm_launch as launch
from arat_fast.kernels import split_batch_norm_plan as plan
from arat_fast.kernels.cpp_library import library
from arat_fast.kernels.dispatch import INTERPRETING
from arat_fast.kernels.split_batch_norm import split_batch_norm, split_batch_norm_reference

EPS = 1e-5
# Images a branch, channels, height, width. N·H·W is a multiple of nothing in the odd ones.
ODD = [(3, 3, 5, 7), (1, 16, 5, 5), (3, 17, 7, 5), (2, 1, 3, 3), (80, 9, 4, 4)]
RESNET18 = [(1, 64, 32, 32), (1, 128, 16, 16), (3, 256, 8, 8), (3, 512, 4, 4)]
WRN = [(3, 16, 32, 32), (1, 160, 16, 16), (1, 320, 8, 8), (1, 640, 3, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["first", "second"])
def path(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernel paths for every shape: one launch and streaming; on the CPU C++ and PyTorch's kernels."""
    if request.param == "second":
        monkeypatch.setattr(launch, "SMALL_BYTES", 0)
        monkeypatch.setattr(split_batch_norm_cpp, "DTYPES", ())
    elif device.type == "cpu" and not INTERPRETING and library("split_batch_norm") is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    dy: Tensor
    running: tuple[Tensor, Tensor] | None


def make_case(
    shape: tuple[int, int, int, int],
    branches: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    residual: bool,
    relu: bool,
    batch: bool,
    mean: float = 1.5,
    seed: int = 0,
) -> Case:
    """Random data; dy is zero where the pre-activation is so near zero that rounding decides for ReLU."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(seed)
    x = channels_last(torch.randn(n * branches, c, h, w, generator=g) + mean).to(dtype)
    r = channels_last(torch.randn(x.shape, generator=g)).to(dtype) if residual else None
    weight = torch.rand(branches, c, generator=g) + 0.5
    bias = torch.randn(branches, c, generator=g)
    running = None
    if not batch:
        running = (torch.randn(branches, c, generator=g) + mean, torch.rand(branches, c, generator=g) + 0.5)
    dy = channels_last(torch.randn(x.shape, generator=g))
    if relu:
        z = run_exact(Case(x, weight, bias, r, dy, running), relu=False)[0]
        dy = torch.where(z.abs() < 0.05, 0.0, dy)
    case = Case(x, weight, bias, r, channels_last(dy).to(dtype), running)
    for name in ("x", "weight", "bias", "residual", "dy"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.to(device))
    if running is not None:
        case.running = (running[0].to(device), running[1].to(device))
    return case


def _with_gradients(case: Case, function: object, *, relu: bool) -> list[Tensor]:
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (case.x, case.weight, case.bias, case.residual)
        if t is not None
    ]
    residual = leaves[3] if case.residual is not None else None
    running = (
        {} if case.running is None else dict(zip(("running_mean", "running_var"), case.running, strict=True))
    )
    y, mean, var = function(*leaves[:3], residual=residual, relu=relu, eps=EPS, **running)  # type: ignore[operator]
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, case.dy.to(y.dtype))]


def run_exact(case: Case, *, relu: bool) -> list[Tensor]:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double().cpu()

    running = (
        None if case.running is None else (case.running[0].double().cpu(), case.running[1].double().cpu())
    )
    exact = Case(*(wide(t) for t in (case.x, case.weight, case.bias, case.residual, case.dy)), running)  # type: ignore[arg-type]
    return _with_gradients(exact, split_batch_norm_reference, relu=relu)


def pytorch_split_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What eager PyTorch does in the same dtype: a BatchNorm a branch, cat, add, ReLU."""
    parts, means, variances = [], [], []
    for k, part in enumerate(x.chunk(weight.shape[0])):
        mean, var = torch.zeros_like(weight[k]), torch.zeros_like(weight[k])
        if running_mean is None or running_var is None:
            parts.append(F.batch_norm(part, mean, var, weight[k], bias[k], True, 1.0, eps))
            rows = part.numel() // part.shape[1]
            var = var * ((rows - 1) / rows)
        else:
            mean, var = running_mean[k], running_var[k]
            parts.append(F.batch_norm(part, mean, var, weight[k], bias[k], False, 0.0, eps))
        means.append(mean)
        variances.append(var)
    y = torch.cat(parts)
    y = y if residual is None else y + residual
    return y.relu() if relu else y, torch.stack(means).detach(), torch.stack(variances).detach()


NAMES = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")


def check(case: Case, *, relu: bool) -> None:
    ours = _with_gradients(case, split_batch_norm, relu=relu)
    theirs = _with_gradients(case, pytorch_split_bn, relu=relu)
    exact = run_exact(case, relu=relu)
    for name, a, b, e in zip(NAMES, ours, theirs, exact, strict=False):
        assert a.dtype == b.dtype, name
        if a.ndim == 4:
            assert a.is_contiguous(memory_format=torch.channels_last), name
        try:
            assert_as_accurate_as(a, b, e)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("branches", [1, 2])
def test_odd_shapes_every_form(
    shape: tuple[int, int, int, int], branches: int, dtype: torch.dtype, device: torch.device, path: str
) -> None:
    forms = list(itertools.product((True, False), repeat=3))
    if dtype != torch.float32:  # the trainer's forms
        forms = [(True, True, True), (False, True, True), (True, True, False)]
    for residual, relu, batch in forms:
        case = make_case(shape, branches, dtype, device, residual=residual, relu=relu, batch=batch)
        check(case, relu=relu)


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
@pytest.mark.parametrize("shape", RESNET18 + WRN, ids=str)
def test_network_shapes(
    shape: tuple[int, int, int, int], dtype: torch.dtype, residual: bool, device: torch.device, path: str
) -> None:
    if INTERPRETING and path == "first" and (shape != RESNET18[3] or dtype != torch.bfloat16):
        pytest.skip("the interpreter is slow: the one-launch path on one wide layer only")
    if INTERPRETING and dtype != torch.bfloat16 and shape not in (RESNET18[2], WRN[3]):
        pytest.skip("the interpreter is slow: float32 and float16 on two layers only")
    case = make_case(shape, 2, dtype, device, residual=residual, relu=True, batch=True)
    check(case, relu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_that_loop(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs, as many steps each as in layers a hundred times this size, the last one cut short."""
    monkeypatch.setattr(launch, "SMALL_BYTES", 0)
    monkeypatch.setattr(plan, "PROGRAMS", 6)
    for shape in ((5, 17, 13, 11), (5, 32, 13, 17)):
        for residual in (True, False):
            case = make_case(shape, 2, dtype, device, residual=residual, relu=True, batch=True)
            check(case, relu=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [True, False])
def test_large_mean(dtype: torch.dtype, batch: bool, device: torch.device, path: str) -> None:
    """mean/std = 100: a sum of squares in fp32 would lose the variance (5e-3)."""
    case = make_case((5, 32, 13, 17), 2, dtype, device, residual=False, relu=False, batch=batch, mean=100.0)
    check(case, relu=False)
    if batch:
        _, mean, var = split_batch_norm(case.x, case.weight, case.bias)
        exact = case.x.double().permute(0, 2, 3, 1).reshape(2, -1, 32)
        torch.testing.assert_close(mean.double(), exact.mean(1), rtol=2e-5, atol=0)
        torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels(dtype: torch.dtype, device: torch.device, path: str) -> None:
    """No variance: y is the bias, gradients are finite, the variance is zero to rounding."""
    case = make_case((3, 16, 5, 5), 2, dtype, device, residual=False, relu=False, batch=True)
    case.x[:, ::2] = 3.0
    y, _, var = split_batch_norm(case.x, case.weight, case.bias)
    assert float(var[:, ::2].abs().max()) < 1e-11
    assert float(var.min()) >= 0
    expected = case.bias.repeat_interleave(3, 0)[:, ::2, None, None].expand(-1, -1, 5, 5)
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y[:, ::2].float(), expected, rtol=tolerance, atol=tolerance)
    assert all(bool(t.isfinite().all()) for t in _with_gradients(case, split_batch_norm, relu=False))


def test_zero_gradients(device: torch.device, path: str) -> None:
    case = make_case((3, 16, 5, 5), 2, torch.float32, device, residual=True, relu=True, batch=True)
    case.dy.zero_()
    for name, value in zip(NAMES[3:], _with_gradients(case, split_batch_norm, relu=True)[3:], strict=True):
        assert not value.count_nonzero(), name


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_as_pytorch(
    value: float, relu: bool, batch: bool, device: torch.device, path: str
) -> None:
    """The same elements of y and of the gradients are NaN or infinite as with nn.BatchNorm2d."""
    case = make_case((2, 8, 5, 5), 2, torch.float32, device, residual=False, relu=relu, batch=batch)
    case.x[0, 1, 2, 3] = value
    case.x[3, 4, 0, 0] = value
    ours = _with_gradients(case, split_batch_norm, relu=relu)
    with torch.backends.cudnn.flags(enabled=False):  # PyTorch's own, whichever library it would ask
        theirs = _with_gradients(case, pytorch_split_bn, relu=relu)
    for name, a, b in zip(NAMES, ours, theirs, strict=False):
        if name in ("mean", "var"):  # Welford makes NaN of the infinity that a sum keeps; y is NaN either way
            assert torch.equal(a.isfinite(), b.isfinite())
            continue
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isinf(), b.isinf()), name


def test_same_bits_every_run(device: torch.device, path: str) -> None:
    case = make_case((3, 32, 13, 11), 2, torch.bfloat16, device, residual=True, relu=True, batch=True)
    first = _with_gradients(case, split_batch_norm, relu=True)
    second = _with_gradients(case, split_batch_norm, relu=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_branch_does_not_see_the_other(device: torch.device, path: str) -> None:
    case = make_case((3, 16, 7, 5), 2, torch.float32, device, residual=True, relu=True, batch=True)
    both = _with_gradients(case, split_batch_norm, relu=True)
    assert case.residual is not None
    for k in range(2):
        part = slice(3 * k, 3 * k + 3)
        row = slice(k, k + 1)
        alone = Case(case.x[part], case.weight[row], case.bias[row], case.residual[part], case.dy[part], None)
        one = _with_gradients(alone, split_batch_norm, relu=True)
        for name, a, b in zip(NAMES, both, one, strict=True):
            assert torch.equal(a[part] if a.ndim == 4 else a[row], b), name


@gpu_only
def test_offsets_past_two_to_the_31() -> None:
    """A (2, 64, 4096, 4224) bf16 batch has 2.2e9 elements: last rows come out as the first."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    torch.manual_seed(0)
    row = torch.randn(1, 64, 1, 4224, device="cuda").to(torch.bfloat16)
    x = row.expand(2, 64, 4096, 4224).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, 64, device="cuda") + 0.5, torch.randn(2, 64, device="cuda")
    y, mean, var = split_batch_norm(x, weight, bias, relu=True)
    expected, _, _ = split_batch_norm(
        channels_last(row.repeat(2, 1, 1, 1)),
        weight,
        bias,
        running_mean=mean,
        running_var=var,
        relu=True,
    )
    assert torch.equal(y[:, :, -1:], expected)
    assert torch.equal(y[:, :, :1], expected)
    exact = row.double().permute(0, 2, 3, 1).reshape(-1, 64)
    torch.testing.assert_close(mean.double(), exact.mean(0).expand(2, -1), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var(0, correction=0).expand(2, -1), rtol=2e-5, atol=0)
