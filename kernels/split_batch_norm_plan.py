"""Block shapes of the split-BN kernels: from the tensor's shape alone, never from the GPU's name.

So the same shapes give the same bits on every GPU of one architecture. A program of a reduction has 4 warps
and 4 KiB of an activation in registers at a time; about 1,024 programs share a reduction, which keeps 132
multiprocessors full and leaves at most 1,024 partial results a channel.
"""

from typing import NamedTuple

from .dispatch import INTERPRETING

__all__ = ["Reduction", "cdiv", "channel_block", "combination", "elementwise", "reduction", "small"]

# Of a reduction, about: 4 to 8 a multiprocessor on the largest GPUs.
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


def channel_block(channels: int, largest: int = 64) -> int:
    """Channels a tile spans: the widest power of two that divides them, else one that covers them."""
    for block in (64, 32, 16):
        if block <= largest and channels % block == 0:
            return block
    return min(64, max(8, _power_of_two(channels)))


def reduction(rows: int, channels: int, branches: int, itemsize: int, streams: int) -> Reduction:
    """Plan for `streams` activations read together."""
    block_c = channel_block(channels)
    # 8 to 16 accumulators and two loads of 32 bytes a thread; with twice of either, ptxas spills at 64 or 72
    # registers.
    wide = channels % 8 == 0  # else each element has an address of its own
    block_r = (4096 // itemsize if wide else 1024) // block_c
    unroll = 2 // streams
    columns = branches * cdiv(channels, block_c)
    programs = max(1, PROGRAMS // columns)
    steps = _power_of_two(cdiv(rows, block_r * unroll * programs))
    return Reduction(steps, unroll, block_r, block_c, cdiv(rows, block_r * unroll * steps))


def combination(splits: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_C) of the kernels that add up partial results: 4,096 elements at most."""
    block_s = _power_of_two(splits)
    return block_s, max(4, min(32, 4096 // block_s))


def elementwise(channels: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C) of the kernels that write an activation: 8 KiB of each stream a program."""
    block_c = channel_block(channels)
    tile = 8192 // itemsize if channels % 8 == 0 else 2048
    return tile * (8 if INTERPRETING else 1) // block_c, block_c  # programs are what costs when interpreting


def small(rows: int, channels: int, itemsize: int) -> tuple[int, int, int, int]:
    """(STEPS, BLOCK_R, BLOCK_C, num_warps) of the one-launch kernels: narrow columns, many warps."""
    block_c = channel_block(channels, largest=16)
    # 64 bytes of each stream a thread; with 128, backward needs 253 of the 255 registers in fp32.
    block_r = min(16384 // itemsize // block_c, max(16, _power_of_two(rows)))
    return cdiv(rows, block_r), block_r, block_c, max(1, min(8, block_r * block_c // 512))
