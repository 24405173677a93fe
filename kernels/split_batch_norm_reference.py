"""Split batch normalisation in plain PyTorch: the oracle that the kernels and the CPU path are held against.

The channels-last storage of (N, C, H, W) is read as a (B, R, C) view: B branches in equal parts of the batch,
R = N·H·W / B rows a branch. Everything is computed in fp32 (float64 for float64 input), from differentiable
operations only, so the twin is also the formula behind second derivatives.
"""

import torch
from torch import Tensor

__all__ = [
    "apply_reference",
    "as_branches",
    "backward_reference",
    "input_gradient_reference",
    "pack_bits",
    "reduce_reference",
    "split_batch_norm_reference",
    "statistics_reference",
    "through_relu_reference",
    "unpack_bits",
]


def as_branches(x: Tensor, branches: int) -> Tensor:
    """View of the channels-last (N, C, H, W) tensor as (branches, rows, C); never copies."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(branches, n * h * w // branches, c)


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return rows.to(like.dtype).view(n, h, w, c).permute(0, 3, 1, 2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean (rows, C) as uint8 (rows, ceil(C / 8)): channel c is bit c % 8 of byte c // 8."""
    rows, c = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -c % 8)).view(rows, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, channels: int) -> Tensor:
    """Inverse of `pack_bits`: boolean (rows, channels)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).view(bits.shape[0], -1)[:, :channels].bool()


def statistics_reference(x: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per branch and channel, each (branches, C), in two passes."""
    rows = _wide(as_branches(x, branches))
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().mean(1)


def _preactivation(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    branches = weight.shape[0]
    # (x - mean) first: x·scale + shift would lose |mean| / std of the mantissa.
    scale = weight * torch.rsqrt(var + eps)
    z = (_wide(as_branches(x, branches)) - mean[:, None]) * scale[:, None] + bias[:, None]
    return z if residual is None else z + _wide(as_branches(residual, branches))


def apply_reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """[ReLU]((x − mean)·weight/√(var + eps) + bias [+ residual]) like x, and where ReLU let through."""
    z = _preactivation(x, mean, var, weight, bias, residual, eps)
    if not relu:
        return _as_images(z, x), None
    closed = z <= 0  # NaN is let through, as PyTorch's ReLU does
    bits = pack_bits(~closed.detach().view(-1, x.shape[1]))
    return _as_images(z.masked_fill(closed, 0), x), bits


def through_relu_reference(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Gradient before the ReLU, (B, R, C) fp32: gate is packed bits, or y, or found again from x."""
    branches = weight.shape[0]
    g = _wide(as_branches(dy, branches))
    if not relu:
        return g
    if gate is None:
        assert x is not None
        closed = _preactivation(x, mean, var, weight, bias, None, eps).detach() <= 0
    elif gate.dtype == torch.uint8:
        closed = ~unpack_bits(gate, weight.shape[1]).view_as(g)
    else:
        closed = as_branches(gate, branches) <= 0
    return g.masked_fill(closed, 0)


def reduce_reference(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g·x̂ over the rows, each (branches, C): the gradients of bias and weight."""
    g = through_relu_reference(dy, x, gate, relu, mean, var, weight, bias, eps)
    centred = _wide(as_branches(x, weight.shape[0])) - mean[:, None]
    return g.sum(1), (g * centred).sum(1) * torch.rsqrt(var + eps)


def input_gradient_reference(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_g: Tensor | None,
    mean_g_xhat: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(dx, gradient of the residual), like dy; without the two means the statistics are constants."""
    g = through_relu_reference(dy, x, gate, relu, mean, var, weight, bias, eps)
    rstd = torch.rsqrt(var + eps)
    inner = g
    if mean_g is not None:
        assert x is not None
        assert mean_g_xhat is not None
        xhat = (_wide(as_branches(x, weight.shape[0])) - mean[:, None]) * rstd[:, None]
        inner = g - mean_g[:, None] - xhat * mean_g_xhat[:, None]
    return _as_images(inner * (weight * rstd)[:, None], dy), _as_images(g, dy)


def backward_reference(
    dy: Tensor, x: Tensor, gate: Tensor | None, relu: bool, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias) with batch statistics, differentiable again in dy, x, weight."""
    mean, var = statistics_reference(x, weight.shape[0])
    dbias, dweight = reduce_reference(dy, x, gate, relu, mean, var, weight, bias, eps)
    count = x.numel() // weight.numel()
    dx, dresidual = input_gradient_reference(
        dy, x, gate, relu, mean, var, weight, bias, dbias / count, dweight / count, eps
    )
    return dx, dresidual, dweight, dbias


def split_batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `split_batch_norm`: y like x, and the mean and biased variance used, each (branches, C)."""
    if running_mean is None or running_var is None:
        mean, var = statistics_reference(x, weight.shape[0])
    else:
        mean, var = running_mean, running_var
    return apply_reference(x, mean, var, weight, bias, residual, relu, eps)[0], mean, var
