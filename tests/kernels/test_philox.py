"""The Philox twin against published vectors and against Triton's own generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from exactness import compiled_only

from arat_fast.kernels.dispatch import INTERPRETING
from arat_fast.kernels.philox import below, normals_from_words, philox4x32, split64, uniform_from_word

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0]


@triton.jit
def _draw(words, uniforms, normals, seed_pointer, first, c2, c3, BLOCK: tl.constexpr):
    seed = tl.load(seed_pointer)
    lane = tl.arange(0, BLOCK)
    index = first + lane.to(tl.int64)
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + c2, zero + c3)
    tl.store(words + 4 * lane + 0, w0.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 3, w3.to(tl.int32, bitcast=True))
    tl.store(uniforms + lane, tl.rand(seed, index))
    tl.store(normals + lane, tl.randn(seed, index))


def _as_tensors(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.int64) for value in values]


def test_published_vectors():
    """Known answers of Random123: zeros, ones, and the digits of pi."""
    cases = [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for (k0, k1), counter, expected in cases:
        seed = k0 | k1 << 32
        seed -= 2**64 if seed >= 2**63 else 0
        words = philox4x32(*_as_tensors(seed, *counter))
        assert tuple(int(word) for word in words) == expected


def test_numpy_draws_the_same_words():
    index = np.arange(-3, 5000, dtype=np.int64)
    tensor = torch.from_numpy(index)
    zero, stream = torch.zeros(1, dtype=torch.int64), torch.tensor([7])
    for seed in SEEDS:
        expected = philox4x32(torch.tensor([seed]), *split64(tensor), stream, zero)
        array_seed, array_zero = np.array([seed], np.int64), np.zeros(1, np.int64)
        words = philox4x32(array_seed, *split64(index), array_zero + 7, array_zero)
        for ours, theirs in zip(words, expected, strict=True):
            assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "c2", "c3"), [(0, 0, 0), (2**32 - 100, 5, 9), (2**40 + 3, 2**31 - 1, 1)])
def test_triton_draws_the_same_numbers(device, seed, first, c2, c3):
    if device.type == "cpu" and not INTERPRETING:
        pytest.skip("Triton runs on a GPU or in the interpreter")
    count = 4096
    words = torch.empty(count, 4, dtype=torch.int32, device=device)
    uniforms, normals = (torch.empty(count, device=device) for _ in range(2))
    seed_tensor = torch.tensor(seed, dtype=torch.int64, device=device)
    _draw[(1,)](words, uniforms, normals, seed_tensor, first, c2, c3, BLOCK=count)

    index = torch.arange(first, first + count, device=device)
    c2, c3 = (torch.tensor(value, device=device) for value in (c2, c3))
    expected = torch.stack(philox4x32(seed_tensor, *split64(index), c2, c3), 1)
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)

    zero = torch.zeros((), dtype=torch.int64, device=device)
    w0, w1, _, _ = philox4x32(seed_tensor, *split64(index), zero, zero)
    assert torch.equal(uniforms, uniform_from_word(w0))
    expected_normals = normals_from_words(w0, w1)[0]
    error = (normals - expected_normals).abs()
    assert float(error.max()) < 1e-3
    assert float(error.median()) < 2e-7


def test_uniforms_and_normals_are_what_they_say():
    zero = torch.zeros((), dtype=torch.int64)
    words = philox4x32(zero + 3, torch.arange(200_000), zero, zero, zero)
    edges = uniform_from_word(torch.tensor([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    assert float(edges.min()) == 0
    assert float(edges.max()) < 1
    for word in words:
        uniform = uniform_from_word(word).double()
        assert abs(float(uniform.mean()) - 0.5) < 3e-3
        assert abs(float(uniform.var()) - 1 / 12) < 1e-3
    for normal in (*normals_from_words(*words[:2]), *normals_from_words(*words[2:])):
        assert abs(float(normal.mean())) < 0.01
        assert abs(float(normal.var()) - 1) < 0.015
        assert bool(normal.isfinite().all())
    assert abs(float(torch.corrcoef(torch.stack([w.double() for w in words])).triu(1).abs().max())) < 0.01


def test_below_covers_its_range():
    zero = torch.zeros((), dtype=torch.int64)
    word = philox4x32(zero, torch.arange(90_000), zero, zero, zero)[0]
    counts = torch.bincount(below(word, 9), minlength=9)
    assert counts.numel() == 9
    assert float((counts - 10_000).abs().max()) < 500
    extremes = torch.tensor([0, 0xFFFFFFFF])
    assert below(extremes, 2**31).tolist() == [0, 2**31 - 1]


@compiled_only
def test_compiles_to_one_graph():
    def draw(seed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return uniform_from_word(philox4x32(seed, *split64(index), zero, zero)[2])

    seed, index = torch.tensor(-5), torch.arange(1000)
    assert torch.equal(torch.compile(draw, fullgraph=True)(seed, index), draw(seed, index))
