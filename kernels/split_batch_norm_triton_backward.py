# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Triton kernels of split batch normalisation, backward; tiles and offsets as in the forward ones."""

import triton
import triton.language as tl

from .split_batch_norm_triton import inverse_std

__all__ = [
    "GATE_BITS",
    "GATE_NONE",
    "GATE_RECOMPUTE",
    "input_gradient_kernel",
    "reduce_combine_kernel",
    "reduce_partial_kernel",
    "small_backward_kernel",
]

# How backward learns where ReLU let through: there was none; packed bits; the sign of the output computed
# again from x, which the pass reads anyway.
GATE_NONE = tl.constexpr(0)
GATE_BITS = tl.constexpr(1)
GATE_RECOMPUTE = tl.constexpr(2)


@triton.jit
def _incoming(dy, second, ok, offsets, JOIN: tl.constexpr):
    """Gradient of the output, fp32: dy or, with JOIN, dy + second, rounded as their sum would be."""
    g = tl.load(dy + offsets, mask=ok, other=0.0).to(tl.float32)
    if JOIN:
        g += tl.load(second + offsets, mask=ok, other=0.0).to(tl.float32)
        g = g.to(dy.dtype.element_ty).to(tl.float32)
    return g


@triton.jit
def _through_relu(
    g,
    bits,
    bits_ok,
    bits_offsets,
    centred,
    scale,
    shift,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient before the ReLU."""
    if GATE == GATE_BITS:
        packed = tl.load(bits + bits_offsets, mask=bits_ok, other=0).to(tl.int32)
        opened = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.where(tl.reshape(opened, (BLOCK_R, BLOCK_C)) != 0, g, 0.0)
    elif GATE == GATE_RECOMPUTE:
        g = tl.where(tl.fma(centred, scale[None, :], shift[None, :]) <= 0, 0.0, g)
    return g


@triton.jit
def _reduce_rows(
    dy,
    second,
    joined,
    x,
    bits,
    rows,
    C,
    channel,
    byte,
    centre,
    scale,
    shift,
    steps,
    UNROLL: tl.constexpr,
    GATE: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ g and Σ g·(x − mean) over `rows` rows, a lane an element of the tile; JOIN writes g to `joined`."""
    lane = tl.arange(0, BLOCK_R)
    offsets = lane[:, None] * C + channel[None, :]
    channel_ok = (channel < C)[None, :]
    G = (C + 7) // 8
    bits_offsets = lane[:, None] * G + byte[None, :]
    byte_ok = (byte < G)[None, :]
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        for u in tl.static_range(UNROLL):
            row_ok = (((step * UNROLL + u) * BLOCK_R + lane) < rows)[:, None]
            ok = row_ok & channel_ok
            g = _incoming(dy, second, ok, offsets, JOIN)
            centred = tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32) - centre[None, :]
            g = _through_relu(
                g, bits, row_ok & byte_ok, bits_offsets, centred, scale, shift, GATE, BLOCK_R, BLOCK_C
            )
            if JOIN:
                tl.store(joined + offsets, g.to(joined.dtype.element_ty), mask=ok)
                joined += BLOCK_R * C
            sum_g += g
            # Rows past the end have g = 0, but 0·(0 − mean) is NaN where the mean is not finite, as it should
            # be.
            sum_gx += g * centred
            dy += BLOCK_R * C
            second += BLOCK_R * C
            x += BLOCK_R * C
            bits += BLOCK_R * G
    return tl.sum(sum_g, 0), tl.sum(sum_gx, 0)


@triton.jit(do_not_specialize=["steps"])
def reduce_partial_kernel(
    dy,
    second,
    joined,
    x,
    bits,
    mean,
    var,
    weight,
    bias,
    partial,
    R,
    C,
    eps,
    steps,
    UNROLL: tl.constexpr,
    GATE: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[branch, split] = (Σ g, Σ g·(x − mean)); grid (split, column, branch).

    JOIN: g is of dy + second, and written to `joined`.
    """
    split = tl.program_id(0)
    branch = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    at = branch * C + channel
    centre = tl.load(mean + at, mask=channel_ok, other=0.0)
    scale = centre
    shift = centre
    if GATE == GATE_RECOMPUTE:
        scale = tl.load(weight + at, mask=channel_ok, other=0.0)
        scale *= inverse_std(tl.load(var + at, mask=channel_ok, other=1.0), eps)
        shift = tl.load(bias + at, mask=channel_ok, other=0.0)
    first = split * (steps * UNROLL * BLOCK_R)
    start = branch.to(tl.int64) * R + first
    sum_g, sum_gx = _reduce_rows(
        dy + start * C,
        second + start * C,
        joined + start * C,
        x + start * C,
        bits + start * ((C + 7) // 8),
        R - first,
        C,
        channel,
        byte,
        centre,
        scale,
        shift,
        steps,
        UNROLL,
        GATE,
        JOIN,
        BLOCK_R,
        BLOCK_C,
    )
    partial += (branch * tl.num_programs(0) + split) * 2 * C
    tl.store(partial + channel, sum_g, mask=channel_ok)
    tl.store(partial + C + channel, sum_gx, mask=channel_ok)


@triton.jit(do_not_specialize=["splits"])
def reduce_combine_kernel(
    partial, var, sum_g, sum_gxhat, C, splits, eps, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ g and Σ g·x̂ from the partial results, the gradients of bias and weight; grid (column, branch)."""
    branch = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    split = tl.arange(0, BLOCK_S)
    offsets = (branch * splits + split)[:, None] * 2 * C + channel[None, :]
    ok = (split < splits)[:, None] & channel_ok[None, :]
    total_g = tl.sum(tl.load(partial + offsets, mask=ok, other=0.0), 0)
    total_gx = tl.sum(tl.load(partial + offsets + C, mask=ok, other=0.0), 0)
    at = branch * C + channel
    rstd = inverse_std(tl.load(var + at, mask=channel_ok, other=1.0), eps)
    tl.store(sum_g + at, total_g, mask=channel_ok)
    tl.store(sum_gxhat + at, total_gx * rstd, mask=channel_ok)


@triton.jit
def input_gradient_kernel(
    dy,
    x,
    bits,
    mean,
    var,
    weight,
    bias,
    sum_g,
    sum_gxhat,
    dx,
    dresidual,
    R,
    C,
    per_count,
    eps,
    BATCH: tl.constexpr,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = (g − mean(g) − x̂·mean(g·x̂))·scale, g·scale when not BATCH [and the residual's gradient, g].

    per_count = 1 / rows of all ranks; slope = mean(g·x̂) / std; grid (tile, column, branch).
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    branch = tl.num_programs(2) - 1 - tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    at = branch * C + channel
    rstd = inverse_std(tl.load(var + at, mask=channel_ok, other=1.0), eps)
    scale = tl.load(weight + at, mask=channel_ok, other=0.0) * rstd
    centre = scale
    shift = scale
    mean_g = scale
    slope = scale
    if BATCH or GATE == GATE_RECOMPUTE:
        centre = tl.load(mean + at, mask=channel_ok, other=0.0)
        shift = tl.load(bias + at, mask=channel_ok, other=0.0)
    if BATCH:
        n = tl.cast(per_count, tl.float32)
        mean_g = tl.load(sum_g + at, mask=channel_ok, other=0.0) * n
        slope = tl.load(sum_gxhat + at, mask=channel_ok, other=0.0) * n * rstd

    row = tl.arange(0, BLOCK_R)
    first = tile * BLOCK_R
    start = branch.to(tl.int64) * R + first
    row_ok = (first + row < R)[:, None]
    ok = row_ok & channel_ok[None, :]
    offsets = row[:, None] * C + channel[None, :]
    G = (C + 7) // 8
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    bits_ok = row_ok & (byte < G)[None, :]
    bits_offsets = row[:, None] * G + byte[None, :]
    if BATCH or GATE == GATE_RECOMPUTE:
        centred = tl.load(x + start * C + offsets, mask=ok, other=0.0).to(tl.float32) - centre[None, :]
    else:
        centred = 0.0
    g = tl.load(dy + start * C + offsets, mask=ok, other=0.0).to(tl.float32)
    g = _through_relu(
        g, bits + start * G, bits_ok, bits_offsets, centred, scale, shift, GATE, BLOCK_R, BLOCK_C
    )
    if RESIDUAL:
        tl.store(dresidual + start * C + offsets, g.to(dresidual.dtype.element_ty), mask=ok)
    if BATCH:
        g -= mean_g[None, :] + centred * slope[None, :]
    tl.store(dx + start * C + offsets, (g * scale[None, :]).to(dx.dtype.element_ty), mask=ok)


@triton.jit
def small_backward_kernel(
    dy,
    second,
    x,
    bits,
    mean,
    var,
    weight,
    bias,
    dx,
    dresidual,
    dweight,
    dbias,
    R,
    C,
    eps,
    GATE: tl.constexpr,
    JOIN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reductions and input gradient of at most BLOCK_R rows in one launch; grid (column, branch)."""
    branch = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    at = branch * C + channel
    start = branch.to(tl.int64) * R
    row = tl.arange(0, BLOCK_R)
    row_ok = (row < R)[:, None]
    ok = row_ok & channel_ok[None, :]
    offsets = row[:, None] * C + channel[None, :]
    G = (C + 7) // 8
    byte = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    g = _incoming(dy + start * C, second + start * C, ok, offsets, JOIN)
    value = tl.load(x + start * C + offsets, mask=ok, other=0.0)
    centre = tl.load(mean + at, mask=channel_ok, other=0.0)
    rstd = inverse_std(tl.load(var + at, mask=channel_ok, other=1.0), eps)
    scale = tl.load(weight + at, mask=channel_ok, other=0.0) * rstd
    shift = tl.load(bias + at, mask=channel_ok, other=0.0)
    centred = value.to(tl.float32) - centre[None, :]
    bits_ok = row_ok & (byte < G)[None, :]
    bits_offsets = row[:, None] * G + byte[None, :]
    g = _through_relu(
        g, bits + start * G, bits_ok, bits_offsets, centred, scale, shift, GATE, BLOCK_R, BLOCK_C
    )
    if RESIDUAL:
        tl.store(dresidual + start * C + offsets, g.to(dresidual.dtype.element_ty), mask=ok)
    sum_g = tl.sum(g, 0)
    sum_gxhat = tl.sum(g * centred, 0) * rstd
    tl.store(dbias + at, sum_g, mask=channel_ok)
    tl.store(dweight + at, sum_gxhat, mask=channel_ok)
    mean_g = sum_g / R
    slope = sum_gxhat / R * rstd
    g -= mean_g[None, :] + centred * slope[None, :]
    tl.store(dx + start * C + offsets, (g * scale[None, :]).to(dx.dtype.element_ty), mask=ok)
