"""Block shapes of the split-BN kernels: from the tensor's shape alone, never from the GPU's name.

So the same shapes give the same bits on every GPU of one architecture. A program of a reduction has 4 warps
and tiles of 4 KiB of each activation. About 1,024 programs share the statistics, 512 the sums of backward,
which need twice the registers: either is one wave of 132 multiprocessors, and leaves so many partial results
a channel.
"""

from typing import NamedTuple

from .dispatch import INTERPRETING

__all__ = ["Reduction", "cdiv", "channel_block", "combination", "elementwise", "reduction", "small"]

# Of a reduction of one stream, about: 8 a multiprocessor on the largest GPUs.
PROGRAMS = 1024


class Reduction(NamedTuple):
    """How rows are shared among the programs of a reduction."""

    steps: int
    unroll: int
    block_r: int
    block_c: int
    splits: int

    @property
    def rows(self) -> int:
        """Rows a program reads."""
        return self.steps * self.unroll * self.block_r


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def channel_block(channels: int) -> int:
    """Channels a tile spans: the widest power of two that divides them, else one that covers them."""
    for block in (64, 32, 16):
        if channels % block == 0:
            return block
    return min(64, max(8, _power_of_two(channels)))


def reduction(rows: int, channels: int, branches: int, itemsize: int, streams: int) -> Reduction:
    """Plan for `streams` activations read together."""
    block_c = channel_block(channels)
    wide = channels % 8 == 0  # else each element has an address of its own
    block_r = (4096 // itemsize if wide else 1024) // block_c
    programs = PROGRAMS if streams == 1 else PROGRAMS // 2
    programs = max(1, programs // (branches * cdiv(channels, block_c)))
    pairs = cdiv(rows, 2 * block_r * programs)
    splits = cdiv(rows, 2 * block_r * pairs)
    # Of three streams one tile each is under way, else two: with more, ptxas spills. A program has the same
    # rows in the same order, so that sums of two and of three streams have the same bits.
    steps, unroll = (2 * pairs, 1) if streams == 3 else (pairs, 2)
    return Reduction(steps, unroll, block_r, block_c, splits)


def combination(splits: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_C) of the kernels that add up partial results: 4,096 elements at most."""
    block_s = _power_of_two(splits)
    return block_s, max(4, min(32, 4096 // block_s))


def elementwise(channels: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C) of the kernels that write an activation: 8 KiB of each stream a program."""
    block_c = channel_block(channels)
    tile = 8192 // itemsize if channels % 8 == 0 else 2048
    return tile * (8 if INTERPRETING else 1) // block_c, block_c  # programs are what costs when interpreting


def small(rows: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps) of the one-launch kernels: 8 channels, 32 elements a thread."""
    block_r = max(16, _power_of_two(rows))
    return block_r, 8, max(1, min(16, block_r // 128))
