# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Triton kernels of split batch normalisation, forward.

Every activation is read as a row-major (branches, rows, channels) array, the storage of a channels-last
batch; a program owns a tile (BLOCK_R rows × BLOCK_C channels), channels innermost, so each thread moves 16
bytes at a time. A pass over both branches is one launch. Sums over rows go through partial results in a fixed
order: no atomics, same bits every run. Branch and row offsets are int64 scalars added to the pointer; only
offsets inside a tile are int32.
"""

import triton
import triton.language as tl

__all__ = [
    "apply_kernel",
    "inverse_std",
    "small_forward_kernel",
    "statistics_combine_kernel",
    "statistics_partial_kernel",
]


@triton.jit
def inverse_std(var, eps):
    """1 / √(var + eps), to an ulp; 0 of an infinite variance."""
    # Not div_rn(1, sqrt_rn(…)): both branch to a slow path, and no load is moved across a branch.
    # eps may arrive as fp64 (Inductor passes Python scalars so), which would halve throughput.
    shifted = var + tl.cast(eps, tl.float32)
    root = tl.rsqrt(shifted)
    newton = tl.fma(root * 0.5, tl.fma(-shifted * root, root, 1.0), root)
    return tl.where(root == 0, root, newton)


@triton.jit
def _combine_lanes(count, mean, m2):
    """Chan's combination of lanes (their axis is 0) with counts, means and sums of squared deviations."""
    n = tl.sum(count, 0)
    share = (count / n)[:, None]
    centre = tl.sum(mean * share, 0)
    # Second look from the centre: at mean/std = 100 one weighted sum alone would cost two digits of the mean.
    away = mean - centre[None, :]
    shift = tl.sum(away * share, 0)
    total = tl.sum(m2 + count[:, None] * away * away, 0) - n * shift * shift
    return n, centre + shift, tl.where(total < 0, 0.0, total)  # where, not maximum: NaN stays NaN


@triton.jit
def _welford_step(value, ok, k, mean, m2):
    """Mean and M2 of k numbers a lane and one more."""
    delta = tl.where(ok, value.to(tl.float32) - mean, 0.0)
    mean += delta * (1.0 / (k + 1.0))  # exactly 1 for the first row; div_rn would branch
    return mean, m2 + delta * (value.to(tl.float32) - mean)


@triton.jit(do_not_specialize=["steps"])
def statistics_partial_kernel(x, partial, R, C, steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial[branch, split] = (mean, M2) of steps·2·BLOCK_R rows; grid (split, column, branch).

    Welford's recurrence, a lane an element of the tile; two tiles are on their way at a time.
    """
    split = tl.program_id(0)
    branch = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = (channel < C)[None, :]
    first = split * (steps * 2 * BLOCK_R)
    rows = R - first
    lane = tl.arange(0, BLOCK_R)
    x += (branch.to(tl.int64) * R + first) * C + lane[:, None] * C + channel[None, :]
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        k = step * 2
        ok = (k * BLOCK_R + lane < rows)[:, None] & channel_ok
        next_ok = ((k + 1) * BLOCK_R + lane < rows)[:, None] & channel_ok
        value = tl.load(x, mask=ok, other=0.0)
        following = tl.load(x + BLOCK_R * C, mask=next_ok, other=0.0)
        mean, m2 = _welford_step(value, ok, k, mean, m2)
        mean, m2 = _welford_step(following, next_ok, k + 1, mean, m2)
        x += 2 * BLOCK_R * C
    count = tl.minimum(tl.maximum((rows - lane + BLOCK_R - 1) // BLOCK_R, 0), steps * 2)
    _, mean, m2 = _combine_lanes(count.to(tl.float32), mean, m2)
    partial += (branch * tl.num_programs(0) + split) * 2 * C
    tl.store(partial + channel, mean, mask=channel < C)
    tl.store(partial + C + channel, m2, mask=channel < C)


@triton.jit(do_not_specialize=["rows", "splits"])
def statistics_combine_kernel(
    partial, mean, var, R, C, rows, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and biased variance from the partial results of `rows` rows each; grid (column, branch)."""
    branch = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_S)
    offsets = (branch * splits + split)[:, None] * 2 * C + channel[None, :]
    ok = (split < splits)[:, None] & (channel < C)[None, :]
    part_mean = tl.load(partial + offsets, mask=ok, other=0.0)
    part_m2 = tl.load(partial + offsets + C, mask=ok, other=0.0)
    count = tl.minimum(tl.maximum(R - split * rows, 0), rows).to(tl.float32)
    n, centre, m2 = _combine_lanes(count, part_mean, part_m2)
    tl.store(mean + branch * C + channel, centre, mask=channel < C)
    tl.store(var + branch * C + channel, m2 / n, mask=channel < C)


@triton.jit
def _apply_tile(
    value,
    residual,
    y,
    bits,
    ok,
    offsets,
    bits_ok,
    bits_offsets,
    mean,
    scale,
    shift,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SAVE_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store [ReLU](value normalised [+ residual]) and the bits; `value` is of the activation's dtype."""
    # Subtract first: z·scale + (shift − mean·scale) would lose |mean| / std of the mantissa.
    # Contracted to one fma, as in backward, which finds the sign again; written as tl.fma it spills on sm_75.
    z = (value.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        z += residual.to(tl.float32)
    if RELU:
        closed = z <= 0  # false for NaN: it is let through, as PyTorch's ReLU does
        z = tl.where(closed, 0.0, z)
        if SAVE_BITS:
            opened = tl.reshape(tl.where(closed, 0, 1), (BLOCK_R, BLOCK_C // 8, 8))
            packed = tl.sum(opened << tl.arange(0, 8)[None, None, :], 2)
            tl.store(bits + bits_offsets, packed.to(tl.uint8), mask=bits_ok)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=ok)


@triton.jit
def apply_kernel(
    x,
    residual,
    mean,
    var,
    weight,
    bias,
    y,
    bits,
    R,
    C,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SAVE_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Y, and a bit an element where ReLU let through; grid (tile, column, branch)."""
    # Last rows first: the pass that took the statistics left those in L2.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    branch = tl.num_programs(2) - 1 - tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    at = branch * C + channel
    scale = tl.load(weight + at, mask=channel_ok, other=0.0)
    scale *= inverse_std(tl.load(var + at, mask=channel_ok, other=1.0), eps)
    centre = tl.load(mean + at, mask=channel_ok, other=0.0)
    shift = tl.load(bias + at, mask=channel_ok, other=0.0)

    row = tl.arange(0, BLOCK_R)
    first = tile * BLOCK_R
    start = branch.to(tl.int64) * R + first
    row_ok = (first + row < R)[:, None]
    G = (C + 7) // 8
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    ok = row_ok & channel_ok[None, :]
    offsets = row[:, None] * C + channel[None, :]
    value = tl.load(x + start * C + offsets, mask=ok, other=0.0)
    added = value
    if HAS_RESIDUAL:
        added = tl.load(residual + start * C + offsets, mask=ok, other=0.0)
    _apply_tile(
        value,
        added,
        y + start * C,
        bits + start * G,
        ok,
        offsets,
        row_ok & (byte < G)[None, :],
        row[:, None] * G + byte[None, :],
        centre,
        scale,
        shift,
        HAS_RESIDUAL,
        RELU,
        SAVE_BITS,
        BLOCK_R,
        BLOCK_C,
    )


@triton.jit
def small_forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    bits,
    mean,
    var,
    R,
    C,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SAVE_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics and apply of a layer of at most BLOCK_R rows in one launch; grid (column, branch).

    A program holds its whole column in registers: everything is read once, all of it before the first sum.
    """
    branch = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    at = branch * C + channel
    start = branch.to(tl.int64) * R
    row = tl.arange(0, BLOCK_R)
    row_ok = (row < R)[:, None]
    ok = row_ok & channel_ok[None, :]
    offsets = row[:, None] * C + channel[None, :]
    value = tl.load(x + start * C + offsets, mask=ok, other=0.0)
    added = value
    if HAS_RESIDUAL:
        added = tl.load(residual + start * C + offsets, mask=ok, other=0.0)
    scale = tl.load(weight + at, mask=channel_ok, other=0.0)
    shift = tl.load(bias + at, mask=channel_ok, other=0.0)

    share = 1.0 / R
    numbers = value.to(tl.float32)
    centre = tl.sum(numbers * share, 0)
    # Second look from the centre, as in _combine_lanes.
    away = tl.where(ok, numbers - centre[None, :], 0.0)
    off = tl.sum(away * share, 0)
    variance = tl.sum(away * away * share, 0) - off * off
    variance = tl.where(variance < 0, 0.0, variance)  # where, not maximum: NaN stays NaN
    centre += off
    tl.store(mean + at, centre, mask=channel_ok)
    tl.store(var + at, variance, mask=channel_ok)
    G = (C + 7) // 8
    byte = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    _apply_tile(
        value,
        added,
        y + start * C,
        bits + start * G,
        ok,
        offsets,
        row_ok & (byte < G)[None, :],
        row[:, None] * G + byte[None, :],
        centre,
        scale * inverse_std(variance, eps),
        shift,
        HAS_RESIDUAL,
        RELU,
        SAVE_BITS,
        BLOCK_R,
        BLOCK_C,
    )
