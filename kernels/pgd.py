"""One step of projected gradient ascent inside the eps-ball and the pixel range: one launch, L2 at most two.

    Linf    x_adv <- clamp(min(max(x_adv + alpha·sign(g), x - eps), x + eps), 0, 1)
    L2      see kernels/pgd_l2.py

x_adv and x are fp32 whatever the model's dtype: in bf16 an image leaves the ball. Per element 8 bytes of
images and the gradient (4, or 2 in half precision) are read, 4 written, and 2 more where the half-precision
copy that the next forward reads is asked for; PyTorch's eight pointwise launches move about 60.

Not finite: as `torch.sign`, a NaN gradient leaves its pixel where it is, an infinite one is a sign. NaN
images stay NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .arithmetic import amount, amount_arguments, clamp_keeping_nan
from .compile_cases import CompileCase
from .dispatch import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    block_size,
    check_amount,
    check_same,
    check_same_layout,
    check_tensor,
    on_device,
    traceable,
    use_triton,
)
from .pgd_l2 import l2_step_reference, launch_l2

Norm = Literal["Linf", "L2"]

_BLOCK = 2048


def linf_step_reference(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The Linf step in plain PyTorch, in the dtype of x (fp32 or float64); equals the kernel bit for bit.

    In place where it can be: on a CPU fresh memory costs more than the arithmetic.
    """
    moved = grad.to(x.dtype).sign().mul_(alpha).add_(x_adv)
    torch.maximum(moved, x - eps, out=moved)
    torch.minimum(moved, x + eps, out=moved)
    return torch.clamp(moved, 0, 1, out=moved if out is None else out)


@triton.jit
def _pgd_linf_kernel(
    x_adv,
    x,
    grad,
    out,
    low_precision,
    eps_tensor,
    alpha_tensor,
    eps_value,
    alpha_value,
    numel,
    EPS_TENSOR: tl.constexpr,
    ALPHA_TENSOR: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # numel % BLOCK == 0: without masks every load is 16 bytes wide
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = None if EVEN else lane < numel - start
    eps = amount(eps_tensor, eps_value, EPS_TENSOR)
    alpha = amount(alpha_tensor, alpha_value, ALPHA_TENSOR)
    g = tl.load(grad + start + lane, mask=inside).to(tl.float32)
    moved = tl.load(x_adv + start + lane, mask=inside)
    centre = tl.load(x + start + lane, mask=inside)
    # Two selects and no product: 0 for zero and NaN, as torch.sign.
    moved += tl.where(g > 0, alpha, tl.where(g < 0, -alpha, 0.0))
    moved = clamp_keeping_nan(moved, centre - eps, centre + eps)
    moved = clamp_keeping_nan(moved, 0.0, 1.0)
    tl.store(out + start + lane, moved, mask=inside)
    if LOW_PRECISION:
        tl.store(low_precision + start + lane, moved.to(low_precision.dtype.element_ty), mask=inside)


def _launch_linf(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    out: Tensor,
    low_precision: Tensor | None,
    eps: float | Tensor,
    alpha: float | Tensor,
) -> None:
    eps_tensor, eps_value, eps_from_tensor = amount_arguments(eps, x)
    alpha_tensor, alpha_value, alpha_from_tensor = amount_arguments(alpha, x)
    numel = x.numel()
    block = block_size(_BLOCK, numel)
    with on_device(x):
        traceable(_pgd_linf_kernel)[(triton.cdiv(numel, block),)](
            x_adv,
            x,
            grad,
            out,
            out if low_precision is None else low_precision,
            eps_tensor,
            alpha_tensor,
            eps_value,
            alpha_value,
            numel,
            EPS_TENSOR=eps_from_tensor,
            ALPHA_TENSOR=alpha_from_tensor,
            LOW_PRECISION=low_precision is not None,
            EVEN=numel % block == 0,
            BLOCK=block,
            num_warps=4,
        )


# The operators hold eps and alpha twice, as a tensor or None and as a number: a schema has no "either".


def _launches(x: Tensor) -> bool:
    return use_triton(x) and x.dtype == torch.float32 and x.numel() > 0


@triton_op("arat_fast::pgd_step_", mutates_args={"x_adv", "low_precision"})
def _pgd_step_in_place(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    low_precision: Tensor | None,
    eps_tensor: Tensor | None,
    alpha_tensor: Tensor | None,
    eps_value: float,
    alpha_value: float,
    norm: str,
) -> None:
    eps = eps_value if eps_tensor is None else eps_tensor
    alpha = alpha_value if alpha_tensor is None else alpha_tensor
    if _launches(x):
        launch = _launch_linf if norm == "Linf" else launch_l2
        launch(x_adv, x, grad, x_adv, low_precision, eps, alpha)
        return
    if norm == "Linf":
        linf_step_reference(x_adv, x, grad, eps, alpha, out=x_adv)
    else:
        x_adv.copy_(l2_step_reference(x_adv, x, grad, eps, alpha))
    if low_precision is not None:
        low_precision.copy_(x_adv)


@triton_op("arat_fast::pgd_step", mutates_args={"low_precision"})
def _pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    low_precision: Tensor | None,
    eps_tensor: Tensor | None,
    alpha_tensor: Tensor | None,
    eps_value: float,
    alpha_value: float,
    norm: str,
) -> Tensor:
    eps = eps_value if eps_tensor is None else eps_tensor
    alpha = alpha_value if alpha_tensor is None else alpha_tensor
    if _launches(x):
        out = torch.empty_like(x_adv)
        launch = _launch_linf if norm == "Linf" else launch_l2
        launch(x_adv, x, grad, out, low_precision, eps, alpha)
        return out
    reference = linf_step_reference if norm == "Linf" else l2_step_reference
    out = reference(x_adv, x, grad, eps, alpha)
    if low_precision is not None:
        low_precision.copy_(out)
    return out


def _checked(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
    low_precision_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, float, float, str]:
    """The operators' last five arguments, after every check."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm is {norm!r}; expected one of {get_args(Norm)}")
    check_tensor("x", x, (torch.float32, torch.float64))
    check_tensor("x_adv", x_adv, (x.dtype,))
    check_tensor("grad", grad, FLOAT_DTYPES if x.dtype == torch.float32 else (torch.float64,))
    if x.ndim == 0:
        raise ValueError("x has no dimension; expected images of shape (N, C, H, W) or (N, …)")
    tensors = {"x_adv": x_adv, "x": x, "grad": grad}
    if low_precision_out is not None:
        check_tensor("low_precision_out", low_precision_out, HALF_DTYPES)
        tensors["low_precision_out"] = low_precision_out
    for name, tensor in tensors.items():
        check_same(name, tensor, "x", x)
    check_same_layout(**tensors)
    check_amount("eps", eps, x)
    check_amount("alpha", alpha, x)
    eps_tensor, alpha_tensor = (value if isinstance(value, Tensor) else None for value in (eps, alpha))
    eps_value, alpha_value = (0.0 if isinstance(value, Tensor) else float(value) for value in (eps, alpha))
    return eps_tensor, alpha_tensor, eps_value, alpha_value, norm


def pgd_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    *,
    norm: Norm = "Linf",
    low_precision_out: Tensor | None = None,
) -> Tensor:
    """Ascend one step in place: x_adv moves along the gradient, back into the ball round x and into [0, 1].

    x_adv, x: (N, C, H, W) or (N, …) of fp32 (float64 runs in plain PyTorch), pixels in [0, 1]. grad: the
    same shape, fp32, bf16 or fp16. All of one layout, channels-last or contiguous. eps and alpha: numbers
    in pixel units, or 0-d fp32 tensors on the device, which a captured CUDA graph reads anew at each replay
    (their values are not checked). low_precision_out: a bf16 or fp16 tensor like x_adv that receives a copy
    from the same launch. Returns x_adv. Not differentiable.

    The result is within one unit in the last place of the Linf ball, and within a relative 1e-6 of the L2
    ball.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or layout, an unknown norm, eps
    or alpha negative or not finite, or x_adv being x itself or requiring gradients.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """
    arguments = _checked(x_adv, x, grad, eps, alpha, norm, low_precision_out)
    if x_adv is x:
        raise ValueError("x_adv is x itself; expected a copy of it, such as random_start(x, …) or x.clone()")
    if x_adv.requires_grad:
        raise ValueError("x_adv requires gradients; expected x_adv.detach(), which shares its memory")
    with torch.no_grad():
        _pgd_step_in_place(x_adv, x, grad, low_precision_out, *arguments)
    return x_adv


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    *,
    norm: Norm = "Linf",
    low_precision_out: Tensor | None = None,
) -> Tensor:
    """`pgd_step_` out of place: returns the new x_adv, in the layout of the old, which it leaves alone."""
    arguments = _checked(x_adv, x, grad, eps, alpha, norm, low_precision_out)
    with torch.no_grad():
        return _pgd_step(x_adv, x, grad, low_precision_out, *arguments)  # type: ignore[no-any-return]


def compile_cases() -> Iterator[CompileCase]:
    """The Linf step by gradient and copy dtype; eps and alpha as tensors (the trainer) or numbers."""
    x, scalar = torch.zeros(_BLOCK), torch.zeros(())
    for dtype in FLOAT_DTYPES:
        for copy in (False, True) if dtype != torch.float32 else (False,):
            for tensors in (True, False):
                half = x.to(dtype)
                yield CompileCase(
                    _pgd_linf_kernel,
                    f"{str(dtype).removeprefix('torch.')} gradient{' and copy' if copy else ''}, "
                    f"eps and alpha {'tensors' if tensors else 'numbers'}",
                    (x, x, half, x, half, scalar, scalar, 0.25, 0.25, x.numel()),
                    {
                        "EPS_TENSOR": tensors,
                        "ALPHA_TENSOR": tensors,
                        "LOW_PRECISION": copy,
                        "EVEN": True,
                        "BLOCK": _BLOCK,
                        "num_warps": 4,
                    },
                    bfloat16=dtype == torch.bfloat16,
                )
