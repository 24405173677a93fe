"""Philox4x32-10 in plain tensor arithmetic: the random streams of `tl.philox`, bit for bit, anywhere.

A word is a function of (seed, counter) alone: nothing global, no state, so CPU, GPU and interpreter draw the
same numbers whatever the block size, layout or order. Counters here are (c0, c1, c2, c3) with c0, c1 the low
and high half of an element's logical index and c2, c3 the stream (an offset, an epoch, a purpose). The same
code takes torch tensors and NumPy arrays of int64: a loader's workers hash as the GPU does.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Words = TypeVar("Words", Tensor, "np.ndarray[Any, np.dtype[np.int64]]")

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_TO_UNIT = 4.6566127342e-10  # the largest fp32 factor that maps 2^31 - 1 below 1, as tl.rand has it
TWO_PI = 6.283185307179586


def split64(value: Words) -> tuple[Words, Words]:
    """The low and high 32-bit words, in [0, 2^32), of int64 values taken as unsigned."""
    return value & _MASK, (value >> 32) & _MASK


def philox4x32(seed: Words, c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """Four random words in [0, 2^32) for each counter, as int64.

    `seed` int64 (its 64 bits are the key); c0 … c3 int64 in [0, 2^32); all tensors or all arrays, of
    broadcastable shapes. Ten rounds, equal to `tl.philox(seed, c0, c1, c2, c3)` bit for bit.
    """
    # int64 products wrap: the 64 bits are those of the unsigned product, and the shift's sign is masked away.
    k0, k1 = split64(seed)
    for _ in range(10):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_b & _MASK, product_a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def uniform_from_word(word: Tensor) -> Tensor:
    """fp32 uniforms in [0, 1) of int64 words in [0, 2^32), equal to `tl.rand`'s bit for bit."""
    folded = torch.where(word > 0x7FFFFFFF, _MASK - word, word)
    return folded.to(torch.float32) * _TO_UNIT


def normals_from_words(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent fp32 normals of two words, by Box and Muller, with the constants of `tl.randn`.

    Logarithm and cosine differ by units in the last place between devices and libraries.
    """
    radius = torch.sqrt(-2.0 * torch.log(uniform_from_word(first).clamp_min(1.0e-7)))
    angle = TWO_PI * uniform_from_word(second)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def below(word: Words, bound: int | Words) -> Words:
    """Integers in [0, bound) of words in [0, 2^32), bound at most 2^31: the high half of word · bound.

    Exact integer arithmetic; no value's probability is off by more than 2^-32.
    """
    return (word * bound) >> 32
