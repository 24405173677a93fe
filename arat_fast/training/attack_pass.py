"""The attack of a training iteration: a start, then K steps of a compiled input gradient and a PGD launch.

What is constant in an iteration is computed once in it: the folded and the cast weights, and the clean
prediction of a KL attack. Radius and step size are device tensors, which a captured graph reads anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.config import AttackConfig
from arat_fast.kernels.pgd import pgd_step_
from arat_fast.kernels.random_start import Kind, random_start
from arat_fast.nn import FoldedModel, SplitBatchNorm2d, bn_mode, use_branch
from arat_fast.training.compiled import compiled_pass, tracing
from arat_fast.training.precision import LowPrecisionTwin

# Keeps the small gradients of an fp16 attack from vanishing; sign and L2 normalisation do not see it.
_FP16_SCALE = 1024.0


def objective(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """What the attack maximises, summed over the images: "ce" and "margin" of int64 labels (N,), "kl" from
    clean probabilities (N, classes).
    """
    if kind == "kl":
        return F.kl_div(F.log_softmax(logits, 1), target, reduction="sum")
    if kind == "ce":
        return F.cross_entropy(logits, target, reduction="sum")
    true = logits.gather(1, target[:, None])[:, 0]
    wrong = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    return (wrong - true).sum()


class AttackPass:
    """Adversarial images of the configured attack on one model: `centre, x_adv = attack(images, labels)`.

    eps, alpha: 0-d device tensors in pixel units, which `set_radius` scales. The centre is `images`, but for
    `aliased_start`, where the authors' code adds the start to the batch itself. Input gradients only; of the
    model nothing changes but, with batch statistics, the attacked branch's running ones.
    """

    def __init__(
        self,
        model: nn.Module,
        twin: LowPrecisionTwin,
        settings: AttackConfig,
        *,
        dtype: torch.dtype,
        seed: Tensor,
        offset: Tensor,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.autocast = autocast
        self.model, self.twin, self.settings, self.dtype = model, twin, settings, dtype
        self.seed, self.offset = seed, offset
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.eps = torch.tensor(settings.eps, dtype=wide, device=seed.device)
        self.alpha = torch.tensor(settings.alpha, dtype=wide, device=seed.device)
        self.folded: FoldedModel | None = None
        self.attacked = twin
        self.compiled_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def compile(self, joined: bool = True) -> None:
        """Compile the attack step (see `compiled_pass`); used where a call asks for it."""
        self.compiled_gradient = compiled_pass(self.gradient, joined)

    def set_radius(self, factor: float) -> None:
        """Scale eps and alpha of the settings, for a warm-up."""
        self.eps.fill_(self.settings.eps * factor)
        self.alpha.fill_(self.settings.alpha * factor)

    def __call__(self, images: Tensor, labels: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
        """(centre, x_adv), like `images`: (N, C, H, W) channels-last in [0, 1]."""
        settings = self.settings
        low = torch.empty_like(images, dtype=self.dtype) if self.dtype != images.dtype else None
        x_adv = self._start(images, low)
        if settings.aliased_start:
            images = x_adv.clone()
        if settings.bn == "running":
            self._refresh_folded(images)
        # A leaf that requires grad, made outside: inside a compiled graph `requires_grad_()` fails on torch
        # 2.11.
        leaf = torch.zeros_like(images, dtype=self.dtype).requires_grad_()
        gradient = self.compiled_gradient if compiled and self.compiled_gradient else self.gradient
        with use_branch(self.model, settings.branch), tracing():
            target = self._clean_probabilities(images) if settings.loss == "kl" else labels
            with bn_mode(self.model, "running" if settings.bn == "running" else "batch", update=True):
                for _ in range(settings.steps):
                    g = gradient(x_adv if low is None else low, target, leaf)
                    pgd_step_(
                        x_adv, images, g, self.eps, self.alpha, norm=settings.norm, low_precision_out=low
                    )
        return images, x_adv

    def _start(self, images: Tensor, low: Tensor | None) -> Tensor:
        settings = self.settings
        if settings.start == "none":
            if low is not None:
                low.copy_(images)
            return images.clone()
        kind: Kind = "normal"
        if settings.start == "uniform":
            kind = "uniform" if settings.norm == "Linf" else "l2"
        return random_start(
            images,
            self.eps,
            seed=self.seed,
            offset=self.offset,
            kind=kind,
            # As the authors: a 0.001 of noise may leave [0, 1] until the first step.
            clamp=kind != "normal" and not settings.aliased_start,
            low_precision_out=low,
        )

    @torch.no_grad()
    def _clean_probabilities(self, images: Tensor) -> Tensor:
        """The target of the KL attack, a constant of the iteration: one forward, statistics left alone."""
        with bn_mode(self.model, "running" if self.settings.bn == "running" else "batch", update=False):
            return F.softmax(self._logits(images.to(self.dtype)), 1)

    def _refresh_folded(self, images: Tensor) -> None:
        """Fold the branch's running statistics into the convolutions, once an iteration."""
        if not any(isinstance(layer, SplitBatchNorm2d) for layer in self.model.modules()):
            return  # nothing to fold: LayerNorm has no statistics
        if self.folded is None:
            self.folded = FoldedModel(self.model, self.settings.branch, images[:2])
            self.attacked = LowPrecisionTwin(self.folded.module, self.dtype)
        self.folded.refresh()
        self.attacked.refresh()

    def gradient(self, x: Tensor, target: Tensor, leaf: Tensor) -> Tensor:
        """Gradient of the objective with respect to x: no weight gradient is ever computed."""
        with torch.enable_grad():
            at = x.detach() + leaf
            loss = objective(self._logits(at), target, self.settings.loss)
            if self.dtype is torch.float16:
                loss = loss * _FP16_SCALE
            (gradient,) = torch.autograd.grad(loss, at)
        # A model that begins with a reshape or a linear layer gives another layout.
        return gradient.contiguous(memory_format=torch.channels_last)

    def _logits(self, x: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.attacked.module(x)
        return logits if logits.dtype is torch.float64 else logits.float()
