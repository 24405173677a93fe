"""The random start: the twin's numbers whatever the layout, inside the ball, and fresh at every offset."""

from __future__ import annotations

import math

import pytest
import torch
from exactness import channels_last, compiled_only, gpu_only

from arat_fast.kernels.random_start import random_start, random_start_reference

EPS = 8 / 255
KINDS = ["uniform", "l2", "normal"]
SHAPES = [(4, 3, 32, 32), (3, 3, 7, 9), (2, 5, 4, 4), (3, 17), (1, 1, 1, 1)]


def batch(shape, device, last=True):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(device)
    return channels_last(x) if last and len(shape) == 4 else x


def twin(x, eps, seed, offset, kind, clamp=True):
    seed, offset = (torch.tensor(value, device=x.device) for value in (seed, offset))
    return random_start_reference(x, eps, seed, offset, kind, clamp)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("clamp", [True, False], ids=["clamped", "unclamped"])
def test_equals_its_twin(device, canary, shape, kind, last, clamp):
    x = canary.like(batch(shape, device, last))
    before, copy = x.clone(), canary.like(x.bfloat16())
    eps = torch.tensor(EPS, device=device)
    start = random_start(x, eps, seed=-7, offset=2**33 + 5, kind=kind, clamp=clamp, low_precision_out=copy)
    expected = twin(x, EPS, -7, 2**33 + 5, kind, clamp)
    if kind == "uniform":
        assert torch.equal(start, expected)
    else:  # normals: units in the last place, more for the few near zero
        torch.testing.assert_close(start, expected, rtol=0, atol=1e-5)
        assert float((start - expected).abs().median()) <= 6e-8
    assert start.stride() == x.stride()
    assert torch.equal(x, before)
    assert torch.equal(copy, start.bfloat16())
    assert torch.equal(start, random_start(x, EPS, seed=-7, offset=2**33 + 5, kind=kind, clamp=clamp))


@pytest.mark.parametrize("kind", KINDS)
def test_layout_does_not_matter(device, kind):
    x = batch((3, 3, 8, 8), device)
    last, first = (random_start(t, EPS, seed=1, offset=2, kind=kind) for t in (x, x.contiguous()))
    torch.testing.assert_close(last, first, rtol=0, atol=0 if kind != "l2" else 1e-7)


def test_every_seed_and_offset_draws_other_numbers(device):
    x = torch.full((2, 3, 16, 16), 0.5, device=device)
    draws = [
        random_start(x, EPS, seed=seed, offset=offset)
        for seed, offset in [(0, 0), (0, 1), (1, 0), (0, 2**32), (2**32, 0), (-1, 0), (0, -1)]
    ]
    values = torch.stack([draw.flatten() for draw in draws]).double() - 0.5
    correlation = torch.corrcoef(values.cpu()) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.12  # 1536 draws: five standard deviations
    # A stream is not another's moved along, as it would be if offsets were added to the element's index.
    assert not bool((draws[0].flatten()[1:] == draws[1].flatten()[:-1]).any())


def test_distributions(device):
    x = torch.full((64, 3, 32, 32), 0.5, device=device)
    uniform = (random_start(x, EPS, seed=0, offset=0) - 0.5).double().cpu()
    assert float(uniform.abs().max()) <= EPS * (1 + 1e-6)
    assert abs(float(uniform.mean())) < EPS * 0.01
    assert float(uniform.std()) == pytest.approx(EPS / math.sqrt(3), rel=0.01)

    normal = (random_start(x, 0.0, seed=0, offset=0, kind="normal") - 0.5).double().cpu()
    assert float(normal.std()) == pytest.approx(0.001, rel=0.01)
    assert abs(float(normal.mean())) < 1e-5

    lengths = (random_start(x, 0.5, seed=0, offset=0, kind="l2") - 0.5).double().flatten(1).norm(dim=1).cpu()
    assert float(lengths.max()) <= 0.5 * (1 + 1e-6)
    assert float(lengths.mean()) == pytest.approx(0.25, abs=0.06)
    assert float(lengths.std()) == pytest.approx(0.5 / math.sqrt(12), rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_clamped_to_pixels_or_not(device, kind):
    x = channels_last(torch.ones(2, 3, 8, 8, device=device))
    assert float(random_start(x, EPS, seed=0, offset=0, kind=kind).max()) == 1
    assert float(random_start(x, EPS, seed=0, offset=0, kind=kind, clamp=False).max()) > 1
    zero = random_start(x, 0.0, seed=0, offset=0, kind=kind)
    assert torch.equal(zero, x) or kind == "normal"
    x[0, 0, 0, 0] = math.nan
    assert random_start(x, EPS, seed=0, offset=0, kind=kind).isnan().sum() == 1


def test_many_pixels(device):
    x = batch((2, 3, 64, 64), device)
    for kind in KINDS:
        start = random_start(x, EPS, seed=5, offset=6, kind=kind)
        torch.testing.assert_close(
            start, twin(x, EPS, 5, 6, kind), rtol=0, atol=1e-5 if kind != "uniform" else 0
        )


def test_float64_and_empty_batches(device):
    x = batch((2, 3, 4, 4), device).double()
    for kind in KINDS:
        start = random_start(x, EPS, seed=1, offset=1, kind=kind)
        assert start.dtype == torch.float64
        single = random_start(x.float(), EPS, seed=1, offset=1, kind=kind)
        torch.testing.assert_close(start.float(), single, rtol=0, atol=1e-5)
        assert random_start(x[:0].float(), EPS, seed=1, offset=1, kind=kind).shape == (0, 3, 4, 4)


BAD = {
    "dtype": (TypeError, "x is bfloat16", lambda x: {"x": x.bfloat16()}),
    "strided": (ValueError, "channels_last", lambda x: {"x": x[:, :, ::2]}),
    "no dimension": (ValueError, "x has no dimension", lambda x: {"x": x.sum()}),
    "eps negative": (ValueError, "eps is -1", lambda x: {"eps": -1}),
    "eps infinite": (ValueError, "eps is inf", lambda x: {"eps": math.inf}),
    "kind": (ValueError, "kind is 'gauss'", lambda x: {"kind": "gauss"}),
    "seed float": (TypeError, "seed is a float", lambda x: {"seed": 1.0}),
    "seed large": (ValueError, "64-bit", lambda x: {"seed": 2**63}),
    "offset dtype": (TypeError, "offset is int32", lambda x: {"offset": torch.tensor(1, dtype=torch.int32)}),
    "offset shape": (ValueError, "offset has shape", lambda x: {"offset": torch.tensor([1])}),
    "offset device": (ValueError, "offset is on meta", lambda x: {"offset": torch.tensor(1, device="meta")}),
    "copy dtype": (TypeError, "low_precision_out is float32", lambda x: {"low_precision_out": x.clone()}),
    "copy shape": (ValueError, "low_precision_out", lambda x: {"low_precision_out": x[:1].bfloat16()}),
    "copy layout": (ValueError, "low_pre", lambda x: {"low_precision_out": x.bfloat16().contiguous()}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(device, name):
    error, match, spoil = BAD[name]
    x = batch((2, 3, 4, 4), device)
    with pytest.raises(error, match=match):
        random_start(**({"x": x, "eps": EPS, "seed": 0, "offset": 0} | spoil(x)))


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(device, kind):
    x = batch((2, 3, 4, 4), device)
    seed, offset = (torch.tensor(value, device=device) for value in (3, 4))
    op = torch.ops.arat_fast.random_start.default
    torch.library.opcheck(op, (x, x.bfloat16(), None, EPS, seed, offset, kind, True))
    torch.library.opcheck(op, (x, None, torch.tensor(EPS, device=device), 0.0, seed, offset, kind, False))

    def start(x, offset):
        return random_start(x, EPS, seed=9, offset=offset, kind=kind)

    compiled = torch.compile(start, fullgraph=True)
    for _ in range(2):
        ours = compiled(x, offset)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, start(x, offset), rtol=0, atol=2e-7)
        offset += 1


@gpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_draws_fresh_numbers(kind):
    x = batch((8, 3, 32, 32), "cuda")
    seed, offset = torch.tensor(11, device="cuda"), torch.tensor(0, device="cuda")
    eps = torch.tensor(EPS, device="cuda")

    def start():
        return random_start(x, eps, seed=seed, offset=offset, kind=kind)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = start()
        offset += 1
    seen = []
    for replay in range(3):
        graph.replay()
        seen.append(captured.clone())
        assert int(offset) == replay + 1
        assert torch.equal(seen[-1], random_start(x, eps, seed=seed, offset=replay, kind=kind))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
