"""Projected gradient descent on any classifier, with the call and argument names of torchattacks.

    x' ← start;   K times:  x' ← clamp(project(x' + alpha·step(∂loss/∂x')), 0, 1)

Linf steps by the gradient's sign, L2 by the gradient over its per-image norm. Images stay in fp32 (float64
where they come so) whatever the model computes in; start and step are one launch each.

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from arat_fast.attacks.attack_mode import attack_mode, has_split_bn, weights_without_gradients
from arat_fast.attacks.checks import (
    check_batch,
    check_labels_fit,
    check_name,
    check_pixels,
    largest_label,
    logits_of,
)
from arat_fast.attacks.objectives import OBJECTIVES, Objective
from arat_fast.kernels.pgd import Norm, pgd_step_
from arat_fast.kernels.random_start import Kind, random_start
from arat_fast.nn import bind_branches, bn_mode

__all__ = ["PGD"]

Start = Literal["uniform", "normal"]
BatchNormMode = Literal["running", "batch"]
Precision = Literal["fp32", "bf16"]


class PGD:
    """`attack = PGD(model); x_adv = attack(images, labels)`.

    Safe by default: BatchNorm on running statistics, input gradients only, and of the model nothing changes:
    no parameter, `.grad`, `requires_grad`, buffer, mode or branch. Layers other than BatchNorm (dropout,
    stochastic depth) are in eval mode while attacking, whatever mode the model is in: the BatchNorm mode is
    `bn`, and is never inferred.

    Args:
        model: maps images to logits (N, classes). Normalisation of the pixels is the model's. Of
            DataParallel and DistributedDataParallel the module inside is attacked, on its one device.
        eps: radius of the ball, in units of [0, 1] pixels.
        alpha: step size, in the same units.
        steps: gradient steps, at least 1; the last iterate is returned.
        random_start: start at a random point round the image, else at the image.
        norm: "Linf" or "L2" ball.
        loss: what is maximised: "ce", "margin", "kl" (from the clean prediction, computed once a call), or
            a function of (logits, labels) to losses (N,) or their sum.
        start: "uniform" in the ball (L2: a normal direction of uniform length), or "normal": 0.001 times
            normal noise, as TRADES.
        bn: statistics that BatchNorm normalises by: "running" or the "batch"'s own.
        update_statistics: let the attack's forwards move the running statistics; with bn="batch" only.
        branch: of a model with split BatchNorm; None leaves the choice that was made.
        precision: "bf16" runs the model under autocast, its weights cast once a call; "fp32" without
            autocast; None as the caller has it.
        compile: compile forward and backward of the model.
        seed: of the random starts; None draws one, here and now, from torch's default CPU generator (another
            for each rank of `torch.distributed`). Consecutive calls start differently; `reset` begins anew.
        check_values: refuse pixels outside [0, 1], NaN and impossible labels, at the cost of one wait for the
            device a call.

    Raises:
        TypeError: model, eps, alpha, steps or seed of another type.
        ValueError: eps or alpha negative or not finite, a Linf eps above 1, an unknown name or branch,
            statistics to be updated without being used, or a KL attack that starts at the image, where its
            gradient is zero.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: Norm = "Linf",
        loss: str | Objective = "ce",
        start: Start = "uniform",
        bn: BatchNormMode = "running",
        update_statistics: bool = False,
        branch: str | None = None,
        precision: Precision | None = None,
        compile: bool = False,
        seed: int | None = None,
        check_values: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"model is a {type(model).__name__}; expected an nn.Module, not scripted. What a "
                "function does belongs in a module's forward: nn.Sequential(normalise, model), both modules"
            )
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps is a {type(steps).__name__}; expected an int")
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        check_name("norm", norm, get_args(Norm))
        check_name("start", start, get_args(Start))
        check_name("bn", bn, get_args(BatchNormMode))
        if precision is not None:
            check_name("precision", precision, get_args(Precision))
        if not callable(loss):
            check_name("loss", loss, OBJECTIVES)
        if loss == "kl" and not random_start:
            raise ValueError("loss is 'kl' without random_start; its gradient at the image itself is zero")
        if update_statistics and bn != "batch":
            raise ValueError(f"update_statistics is True with bn={bn!r}; expected bn='batch'")
        if branch is not None:
            _check_branch(_bare(model), branch)
        self.model = _bare(model)
        self.eps, self.alpha = check_pixels("eps", eps), check_pixels("alpha", alpha)
        if norm == "Linf" and self.eps > 1:
            raise ValueError(f"eps is {eps}; expected at most 1, in units of [0, 1] pixels, such as 8/255")
        self.steps, self.random_start = steps, bool(random_start)
        self.norm, self.loss, self.start, self.bn = norm, loss, start, bn
        self.update_statistics, self.branch, self.precision = update_statistics, branch, precision
        self.check_values = check_values
        self.seed: int = _drawn_seed() if seed is None else seed
        self.reset()
        self._objective: Objective = loss if callable(loss) else OBJECTIVES[loss]
        self._loss: Callable[..., tuple[Tensor, int]] = self._summed_loss
        if compile:
            self._loss = torch.compile(self._summed_loss, dynamic=False)

    def reset(self, seed: int | None = None) -> None:
        """Begin the stream of random starts anew, None: of the same seed. Raises TypeError unless it is an
        int.
        """
        seed = self.seed if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is a {type(seed).__name__}; expected an int or None")
        self.seed, self.calls = seed, 0

    def __repr__(self) -> str:
        names = ("eps", "alpha", "steps", "random_start", "norm", "loss", "start", "bn", "branch", "seed")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"PGD({type(self.model).__name__}, {settings})"

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images.

        Args:
            images: (N, C, H, W), or (N, …), float, pixels in [0, 1]; left alone.
            labels: (N,) int64 class numbers.

        Returns:
            like images, fp32 (float64 for float64 images), without gradient history; channels-last where the
            images are, else contiguous.

        Raises:
            TypeError: images not float, labels not int64, or a model that returns no tensor.
            ValueError: another shape or device, values out of range, or a model whose output is not (N,
                classes).
        """
        check_batch(self.model, images, labels)
        largest = largest_label(images, labels) if self.check_values and len(images) else 0
        with torch.inference_mode(False), torch.no_grad():
            x = _dense(images.detach().to(torch.promote_types(images.dtype, torch.float32)))
            x_adv = self._start(x)
            if not len(images):
                return x_adv
            with self._mode(x.device.type):
                half = torch.bfloat16 if self.precision == "bf16" else None
                # Split BN is told not to update; a plain BatchNorm updates in place, so it gets copies.
                keep = self.bn == "batch" and not self.update_statistics
                weights = weights_without_gradients(self.model, half, copy_buffers=keep)
                target = labels.clone() if labels.is_inference() else labels  # autograd refuses such tensors
                if self.loss == "kl":
                    target = self._clean_probabilities(x, half)
                for k in range(self.steps):
                    at = x_adv.detach().requires_grad_()
                    with torch.enable_grad():
                        loss, classes = self._loss(weights, at, target)
                        if k == 0:
                            check_labels_fit(largest, classes)
                        (gradient,) = torch.autograd.grad(loss, at)
                    pgd_step_(x_adv, x, _like(gradient, x), self.eps, self.alpha, norm=self.norm)
        return x_adv

    def _start(self, x: Tensor) -> Tensor:
        offset = self.calls
        self.calls += 1
        if not self.random_start or not len(x):
            return x.clone()
        kind: Kind = "normal"
        if self.start == "uniform":
            kind = "uniform" if self.norm == "Linf" else "l2"
        return random_start(x, self.eps, seed=self.seed, offset=offset, kind=kind)

    def _mode(self, device: str) -> ExitStack:
        """BatchNorm mode, branch and autocast of the attack."""
        stack = ExitStack()
        stack.enter_context(
            attack_mode(
                self.model,
                batch_statistics=self.bn == "batch",
                update_statistics=self.update_statistics,
                branch=self.branch,
            )
        )
        if self.precision is not None:
            autocast: Any = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")
            stack.enter_context(autocast)
        return stack

    def _clean_probabilities(self, x: Tensor, half: torch.dtype | None) -> Tensor:
        """p(x), (N, classes): one forward that leaves all statistics alone."""
        weights = weights_without_gradients(self.model, half, copy_buffers=self.bn == "batch")
        statistics: Any = nullcontext()
        if has_split_bn(self.model):
            statistics = bn_mode(self.model, self.bn, update=False)
        with statistics:
            return F.softmax(self._logits(weights, x), 1)

    def _logits(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        dtype = torch.float32  # autocast casts where it should: normalisation inside the model stays in fp32
        if self.precision != "bf16":
            dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), x.dtype)
        output = functional_call(self.model, weights, (x.to(dtype),), tie_weights=False)
        logits = logits_of(output, len(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _summed_loss(self, weights: dict[str, Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """The sum over the images, so that no gradient depends on the size of the batch; the classes."""
        logits = self._logits(weights, x)
        classes = logits.shape[1]
        if self.check_values and not target.is_floating_point():
            # Too large a label is refused once the classes are known; on a GPU the loss would abort on it.
            target = target.clamp_max(classes - 1)
        return self._objective(logits, target).sum(), classes


def _drawn_seed() -> int:
    """Reproducible by `torch.manual_seed`; ranks that were seeded alike still start differently."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return int(torch.randint(1 << 32, (), device="cpu")) + (rank << 32)


def _bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers that `functional_call` refuses, or that would average gradients."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _check_branch(model: nn.Module, branch: str) -> None:
    if not has_split_bn(model):
        raise ValueError(
            f"branch is {branch!r}; the model has no split BatchNorm: convert it with convert_split_bn(model)"
        )
    check_name("branch", branch, bind_branches(model).branches)


def _dense(x: Tensor) -> Tensor:
    """`x` where it is channels-last or contiguous, else a contiguous copy."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the layout of x, and in float64 for float64 images."""
    if x.dtype is torch.float64:
        gradient = gradient.to(x.dtype)
    if x.is_contiguous():
        return gradient.contiguous()
    return gradient.contiguous(memory_format=torch.channels_last)
