"""The PGD step: equal to its twin (Linf), as accurate as PyTorch (L2), in the ball, strict about input."""

from __future__ import annotations

import math

import pytest
import torch
from exactness import assert_as_accurate_as, channels_last, compiled_only, gpu_only

from arat_fast.kernels.pgd import linf_step_reference, pgd_step, pgd_step_
from arat_fast.kernels.pgd_l2 import l2_step_reference

EPS, ALPHA = 8 / 255, 2 / 255
L2_EPS, L2_ALPHA = 128 / 255, 32 / 255
SHAPES = [(8, 3, 32, 32), (5, 3, 7, 9), (2, 16, 5, 5), (1, 1, 1, 1), (3, 17), (2, 3, 64, 64)]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["Linf", "L2"]


def images(shape, device, *, last=True, seed=0, gradient=torch.float32, radius=EPS):
    """x, an x_adv within `radius` of it, and a gradient of the size that a mean loss gives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    x_adv = (x + radius * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    grad = (torch.randn(shape, generator=generator) * 1e-3).to(gradient)
    arrange = channels_last if last and len(shape) == 4 else torch.Tensor.contiguous
    return [arrange(tensor.to(device)) for tensor in (x_adv, x, grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_linf_equals_its_twin(device, canary, shape, gradient, last):
    x_adv, x, grad = (canary.like(t) for t in images(shape, device, last=last, gradient=gradient))
    expected = linf_step_reference(x_adv, x, grad, EPS, ALPHA)
    before = x_adv.clone()

    result = pgd_step(x_adv, x, grad, EPS, ALPHA)
    assert torch.equal(result, expected)
    assert result.stride() == x_adv.stride()
    assert torch.equal(x_adv, before)

    eps, alpha = torch.tensor(EPS, device=device), torch.tensor(ALPHA, device=device)
    copy = canary.like(x.bfloat16())
    assert pgd_step_(x_adv, x, grad, eps, alpha, low_precision_out=copy) is x_adv
    assert torch.equal(x_adv, expected)
    assert torch.equal(copy, expected.bfloat16())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_copy(device, canary, norm, half):
    x_adv, x, grad = images((4, 3, 32, 32), device)
    copy = canary.like(torch.zeros_like(x, dtype=half))
    result = pgd_step(x_adv, x, grad, EPS, ALPHA, norm=norm, low_precision_out=copy)
    assert torch.equal(copy, result.to(half))


@pytest.mark.parametrize("norm", NORMS)
def test_stays_in_the_ball_and_the_pixel_range(device, norm):
    for radius in (EPS, 0.3):  # 0.3: a start far outside the ball comes back in one step
        x_adv, x, grad = images((4, 3, 32, 32), device, seed=1, radius=radius)
        x.view(-1)[:100].zero_() if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)[:100].zero_()
        for _ in range(3):
            pgd_step_(x_adv, x, grad, EPS, ALPHA, norm=norm)
        distance = x_adv.double() - x.double()
        if norm == "Linf":
            size, slack = distance.abs().max(), 2**-24  # half a unit in the last place of a pixel near 1
        else:
            size, slack = distance.flatten(1).norm(dim=1).max(), 1e-6 * EPS + 1e-7
        assert float(size) <= float(torch.tensor(EPS)) + slack
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("alpha", [L2_ALPHA, 10 * L2_EPS], ids=["small steps", "steps past the ball"])
def test_l2_is_as_accurate_as_pytorch(device, canary, shape, gradient, alpha):
    x_adv, x, grad = (canary.like(t) for t in images(shape, device, gradient=gradient))
    exact = l2_step_reference(x_adv.double(), x.double(), grad.double(), L2_EPS, alpha)
    pytorch = l2_step_reference(x_adv, x, grad, L2_EPS, alpha)
    result = pgd_step(x_adv, x, grad, L2_EPS, alpha, norm="L2")
    assert_as_accurate_as(result - x, pytorch - x, exact - x.double())
    pgd_step_(
        x_adv, x, grad, torch.tensor(L2_EPS, device=device), torch.tensor(alpha, device=device), norm="L2"
    )
    assert torch.equal(x_adv, result)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 64, 64)], ids=str)
def test_zero_gradient_moves_nothing(device, norm, shape):
    x_adv, x, grad = images(shape, device, radius=1e-4)
    grad[0] = 0
    result = pgd_step(x_adv, x, grad, EPS, ALPHA, norm=norm)
    assert bool(result.isfinite().all())
    torch.testing.assert_close(result[0], x_adv[0], rtol=0, atol=2e-7)
    tiny = pgd_step(x_adv, x, grad * 1e-30, 1.0, ALPHA, norm=norm)
    assert bool(tiny.isfinite().all())
    assert torch.equal(pgd_step(x, x.clone(), grad, 0.0, 0.0, norm=norm), x)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 3, 64, 64)], ids=str)
def test_non_finite_values_go_where_pytorch_sends_them(device, shape):
    x_adv, x, grad = images(shape, device)
    grad[0, 0, 0, 0], grad[0, 1, 0, 0], grad[1, 0, 0, 0] = math.nan, math.inf, -math.inf
    linf = pgd_step(x_adv, x, grad, EPS, ALPHA)
    assert bool(linf.isfinite().all())
    assert linf[0, 0, 0, 0] == x_adv[0, 0, 0, 0]  # torch.sign(NaN) is 0
    assert torch.equal(linf, linf_step_reference(x_adv, x, grad, EPS, ALPHA))

    l2 = pgd_step(x_adv, x, grad, L2_EPS, L2_ALPHA, norm="L2")
    expected = l2_step_reference(x_adv, x, grad, L2_EPS, L2_ALPHA)
    assert torch.equal(l2.isnan(), expected.isnan())
    assert bool(l2[:2].isnan().all())
    assert bool(l2[2].isfinite().all())

    for broken in (x_adv, x):
        broken[2, 0, 0, 0] = math.nan
        assert bool(pgd_step(x_adv, x, grad.nan_to_num(), EPS, ALPHA)[2, 0, 0, 0].isnan())


def test_float64_runs_in_plain_pytorch(device):
    x_adv, x, grad = (t.double() for t in images((2, 3, 8, 8), device))
    assert torch.equal(pgd_step(x_adv, x, grad, EPS, ALPHA), linf_step_reference(x_adv, x, grad, EPS, ALPHA))


def test_empty_batch(device):
    x_adv, x, grad = images((0, 3, 8, 8), device)
    for norm in NORMS:
        assert pgd_step(x_adv, x, grad, EPS, ALPHA, norm=norm).shape == x.shape


def test_gradients_do_not_flow(device):
    x_adv, x, grad = images((2, 3, 4, 4), device)
    assert not pgd_step(x_adv.requires_grad_(), x, grad, EPS, ALPHA).requires_grad
    with pytest.raises(ValueError, match="x_adv requires gradients"):
        pgd_step_(x_adv, x, grad, EPS, ALPHA)


def vector(x):
    return torch.full((2,), 0.1, device=x.device)


# What is spoilt: the error, what its message says, and the arguments that replace the good ones.
BAD = {
    "x_adv dtype": (TypeError, "x_adv is bfloat16", lambda x: {"x_adv": x.bfloat16()}),
    "x dtype": (TypeError, "x is float16", lambda x: {"x": x.half()}),
    "grad dtype": (TypeError, "grad is float64", lambda x: {"grad": x.double()}),
    "no tensor": (TypeError, "grad is a list", lambda x: {"grad": [1.0]}),
    "x_adv shape": (ValueError, "x_adv has shape", lambda x: {"x_adv": x[:1]}),
    "grad shape": (ValueError, "grad has shape", lambda x: {"grad": x[:, :1]}),
    "no dimension": (ValueError, "x has no dimension", lambda x: dict.fromkeys(IMAGES, x.sum())),
    "device": (ValueError, "grad is on meta", lambda x: {"grad": x.to("meta")}),
    "layout": (ValueError, "grad .*channels_last", lambda x: {"grad": x.contiguous()}),
    "strided": (ValueError, "channels_last", lambda x: dict.fromkeys(IMAGES, x[:, :, ::2])),
    "eps negative": (ValueError, "eps is -0.1", lambda x: {"eps": -0.1}),
    "eps NaN": (ValueError, "eps is nan", lambda x: {"eps": math.nan}),
    "alpha infinite": (ValueError, "alpha is inf", lambda x: {"alpha": math.inf}),
    "alpha text": (TypeError, "alpha is a str", lambda x: {"alpha": "2/255"}),
    "eps vector": (ValueError, "eps has shape", lambda x: {"eps": vector(x)}),
    "eps dtype": (TypeError, "eps is int64", lambda x: {"eps": vector(x).sum().long()}),
    "eps device": (ValueError, "eps is on meta", lambda x: {"eps": vector(x).sum().to("meta")}),
    "norm": (ValueError, "norm is 'L1'", lambda x: {"norm": "L1"}),
    "copy dtype": (TypeError, "low_precision_out is float32", lambda x: {"low_precision_out": x.clone()}),
    "copy layout": (ValueError, "low_pre", lambda x: {"low_precision_out": x.bfloat16().contiguous()}),
}
IMAGES = ("x_adv", "x", "grad")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(device, name):
    error, match, spoil = BAD[name]
    x_adv, x, grad = images((2, 3, 4, 4), device)
    arguments = {"x_adv": x_adv, "x": x, "grad": grad, "eps": EPS, "alpha": ALPHA} | spoil(x)
    for step in (pgd_step, pgd_step_):
        with pytest.raises(error, match=match):
            step(**arguments)
    assert torch.equal(x_adv, images((2, 3, 4, 4), device)[0])


def test_x_adv_must_not_be_x(device):
    _, x, grad = images((2, 3, 4, 4), device)
    with pytest.raises(ValueError, match="x_adv is x itself"):
        pgd_step_(x, x, grad, EPS, ALPHA)


@compiled_only
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(device, norm):
    x_adv, x, grad = images((2, 3, 4, 4), device, gradient=torch.bfloat16)
    copy, eps = torch.zeros_like(grad), torch.tensor(EPS, device=device)
    for op in (torch.ops.arat_fast.pgd_step_.default, torch.ops.arat_fast.pgd_step.default):
        torch.library.opcheck(op, (x_adv, x, grad, copy, eps, None, 0.0, ALPHA, norm))
        torch.library.opcheck(op, (x_adv, x, grad, None, None, eps, EPS, 0.0, norm))


@compiled_only
@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_a_graph_break(device, norm):
    def attack(x, grad, eps):
        x_adv = x.clone()
        copy = torch.empty_like(x, dtype=torch.bfloat16)
        pgd_step_(x_adv, x, grad, eps, ALPHA, norm=norm)
        return pgd_step(x_adv, x, -grad, eps, 2 * ALPHA, norm=norm, low_precision_out=copy), x_adv, copy

    _, x, grad = images((2, 3, 8, 8), device)
    eps = torch.tensor(EPS, device=device)
    compiled = torch.compile(attack, fullgraph=True)
    for ours, theirs in zip(compiled(x, grad, eps), attack(x, grad, eps), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7 if ours.dtype == torch.float32 else 4e-3)


@gpu_only
def test_more_elements_than_a_32_bit_offset_reaches():
    """2^31 + 2^20 elements, 30 GB: int64 offsets in the Linf step."""
    numel = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    x = torch.full((numel,), 0.5, device="cuda")
    x_adv, grad = x.clone(), torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    pgd_step_(x_adv, x, grad, EPS, ALPHA)
    assert float(x_adv.min()) == float(x_adv.max()) == pytest.approx(0.5 + ALPHA)


@gpu_only
def test_a_captured_graph_obeys_eps_and_alpha():
    x_adv, x, grad = images((8, 3, 32, 32), torch.device("cuda"))
    eps, alpha = torch.tensor(EPS, device="cuda"), torch.tensor(ALPHA, device="cuda")
    for norm in NORMS:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pgd_step(x_adv, x, grad, eps, alpha, norm=norm)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = pgd_step(x_adv, x, grad, eps, alpha, norm=norm)
        for scale in (1.0, 0.5, 2.0):
            eps.fill_(EPS * scale)
            alpha.fill_(ALPHA * scale)
            graph.replay()
            assert torch.equal(result, pgd_step(x_adv, x, grad, eps, alpha, norm=norm))
