"""One training iteration on the fast path: augmentation, attack, one forward of [clean; adv], loss, backward,
step.

The same mathematics as `arat_fast.reference.train_step`, as one object that any loop can call. What makes it
fast: channels-last activations through the fused split BatchNorm, both branches in one batch, an attack that
computes input gradients only, weights cast once an iteration, and compiled passes: one attack step called K
times, one training pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.config import AttackConfig, resolved_attack
from arat_fast.kernels.augment import random_crop_flip
from arat_fast.kernels.pgd import pgd_step_
from arat_fast.kernels.random_start import random_start
from arat_fast.methods.base import Method, Outputs
from arat_fast.nn import FoldedModel, bn_mode, use_branch
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.precision import DTYPES, LowPrecisionTwin, Precision, resolve_precision


class TrainStep:
    """A training iteration: `metrics = step(images, labels)`.

    Args:
        model: a network of `arat_fast.models`, or any whose BatchNorms are `SplitBatchNorm2d`; channels-last.
        method: the objective. Its branches must be the model's.
        optimizer: over the parameters of model and method; its state may be restored at any time.
        attack: radius, steps and BatchNorm mode of the attack.
        precision: of convolutions and classifier; "auto" picks bf16 where there are matrix units for it.
        compiled: use torch.compile on batches of the first batch's size; other sizes run eagerly.
        padding, flip: augmentation of uint8 batches.
        seed: of crops and attack starts.

    Images are uint8 (N, H, W, C) with `indices`, which are augmented, or float (N, C, H, W) in [0, 1], taken
    as they are. Metrics are 0-d device tensors; nothing waits for the device.

    Raises ValueError when the method needs branches or taps that the model lacks, before anything has
    changed.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        attack: AttackConfig,
        precision: Precision = "auto",
        compiled: bool = True,
        padding: int = 4,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.exact = parameter.device, parameter.dtype is torch.float64
        self.model, self.method, self.optimizer = model, method, optimizer
        self.settings = resolved_attack(attack, method.name)
        self.padding, self.flip, self.seed = padding, flip, seed
        _check_branches(model, method)
        self.precision = resolve_precision(precision, self.device)
        self.dtype = parameter.dtype if self.exact else DTYPES[self.precision]
        self.twin = LowPrecisionTwin(model, self.dtype)
        self.folded: FoldedModel | None = None
        self.attacked = self.twin
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.epoch = torch.ones((), dtype=torch.int64, device=self.device)
        self.guard: FiniteGuard | None = None
        self._compiled_for: torch.Size | None = None
        self._compile = compiled
        self._gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = self._attack_gradient
        self._forward: Callable[[Tensor, Tensor | None, Tensor], tuple[dict[str, Tensor], Outputs]] = (
            self._training_forward
        )

    def __call__(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, *, x_adv: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One iteration. `x_adv`, when given, takes the place of the attack's images."""
        images = self._prepared(images, indices)
        self._check_batch(images, labels)
        if self._compile and self._compiled_for is None:
            self._compile_for(images)
        if self.guard is not None:
            self.guard.before()
        self.twin.refresh()
        if self.method.attacks and x_adv is None:
            images, x_adv = self.attack(images, labels)
        metrics = self._train(images, x_adv if self.method.attacks else None, labels)
        if self.guard is not None:
            names = [n for n in metrics if n != "loss" and not n.startswith("accuracy")]
            self.guard.after([metrics[n] for n in names], self.step)
        self.step.add_(1)
        return metrics

    def _prepared(self, images: Tensor, indices: Tensor | None) -> Tensor:
        if images.dtype == torch.uint8:
            if indices is None:
                raise ValueError("uint8 images need indices: their crops and flips are hashed from them")
            return random_crop_flip(
                images, indices, seed=self.seed, epoch=self.epoch, padding=self.padding, flip=self.flip
            )
        wanted = torch.float64 if self.exact else torch.float32
        if images.dtype != wanted:
            raise ValueError(f"images are {images.dtype}; expected uint8 with indices, or {wanted}")
        return images.contiguous(memory_format=torch.channels_last)

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        if images.device != self.device or labels.device != self.device:
            raise ValueError(
                f"images are on {images.device} and labels on {labels.device}; expected {self.device}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected int64 ({len(images)},)"
            )

    def _compile_for(self, images: Tensor) -> None:
        self._gradient = torch.compile(self._attack_gradient, fullgraph=True, dynamic=False)
        self._forward = torch.compile(self._training_forward, fullgraph=True, dynamic=False)
        self._compiled_for = images.shape

    def _runs_compiled(self, images: Tensor) -> bool:
        return self._compiled_for == images.shape

    def attack(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(centre, x_adv): adversarial images of the configured attack, and the images that its ball is
        round.

        The centre is `images`, but for `aliased_start`, where the authors' code adds the start to the batch
        itself.
        """
        settings = self.settings
        low = torch.empty_like(images, dtype=self.dtype) if self.dtype != images.dtype else None
        if settings.start != "none":
            x_adv = random_start(
                images,
                settings.eps,
                seed=self.seed,
                offset=self.step,
                kind="uniform" if settings.norm == "Linf" else "l2",
                clamp=not settings.aliased_start,
                low_precision_out=low,
            )
            if settings.aliased_start:
                images = x_adv.clone()
        else:
            x_adv = images.clone()
            if low is not None:
                low.copy_(images)
        running = settings.bn == "running"
        if running:
            self._refresh_folded(images)
        # A leaf that requires grad, made outside: inside a compiled graph `requires_grad_()` fails on torch
        # 2.11.
        leaf = torch.zeros_like(images, dtype=self.dtype).requires_grad_()
        gradient = self._gradient if self._runs_compiled(images) else self._attack_gradient
        modes = (use_branch(self.model, "adv"), bn_mode(self.model, settings.bn, update=True))
        with modes[0], modes[1], torch._dynamo.config.patch(trace_autograd_ops=True):
            for _ in range(settings.steps):
                g = gradient(x_adv if low is None else low, labels, leaf)
                pgd_step_(
                    x_adv, images, g, settings.eps, settings.alpha, norm=settings.norm, low_precision_out=low
                )
        return images, x_adv

    def _refresh_folded(self, images: Tensor) -> None:
        """Fold the adv branch's running statistics into the convolutions, once an iteration."""
        if self.folded is None:
            self.folded = FoldedModel(self.model, "adv", images[:2])
            self.attacked = LowPrecisionTwin(self.folded.module, self.dtype)
        self.folded.refresh()
        self.attacked.refresh()

    def _attack_gradient(self, x: Tensor, labels: Tensor, leaf: Tensor) -> Tensor:
        """Gradient of the summed cross entropy with respect to x: no weight gradient is ever computed."""
        with torch.enable_grad():
            at = x.detach() + leaf
            logits = self.attacked.module(at)
            loss = F.cross_entropy(self._wide(logits), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
        return gradient

    def _wide(self, logits: Tensor) -> Tensor:
        return logits if self.exact else logits.float()

    def _training_forward(
        self, images: Tensor, x_adv: Tensor | None, labels: Tensor
    ) -> tuple[dict[str, Tensor], Outputs]:
        """Loss terms and outputs of one pass of the concatenated batch."""
        method = self.method
        chosen = []
        for name in method.plan:
            part = images if name == "clean" else x_adv
            assert part is not None
            chosen.append(part.to(self.dtype))
        if len(method.branches) == len(chosen):
            logits, taps = self._pass(torch.cat(chosen) if len(chosen) > 1 else chosen[0])
            each = list(zip(logits.chunk(len(chosen)), _chunks(taps, len(chosen)), strict=True))
        else:
            # One BatchNorm for both kinds of images: each batch has statistics of its own, so two passes.
            each = [self._pass(batch) for batch in chosen]
        outputs = Outputs()
        for name, (logits, taps) in zip(method.plan, each, strict=True):
            if name == "clean":
                outputs.clean, outputs.taps_clean = logits, taps
            else:
                outputs.adv, outputs.taps_adv = logits, taps
        return method.loss(outputs, labels), outputs

    def _pass(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        taps = dict.fromkeys(self.method.taps, batch)
        logits = self.twin.module(batch, taps) if taps else self.twin.module(batch)
        return self._wide(logits), taps

    def _train(self, images: Tensor, x_adv: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        method = self.method
        method.train()
        split = len(method.branches) > 1
        branch = "both" if split else method.branches[0]
        forward = self._forward if self._runs_compiled(images) else self._training_forward
        self.optimizer.zero_grad(set_to_none=True)
        with use_branch(self.model, branch), bn_mode(self.model, "batch", update=True):
            terms, outputs = forward(images, x_adv, labels)
            total = torch.stack(list(terms.values())).sum()
            total.backward()
        self.twin.gather_gradients()
        self.optimizer.step()
        metrics = {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}
        for name in method.plan:
            logits = outputs.clean if name == "clean" else outputs.adv
            assert logits is not None
            metrics[f"accuracy_{name}"] = (logits.detach().argmax(1) == labels).float().mean()
        return metrics


def _chunks(taps: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Each part's features of a concatenated batch's."""
    return [{name: value.chunk(count)[k] for name, value in taps.items()} for k in range(count)]


def _check_branches(model: nn.Module, method: Method) -> None:
    from arat_fast.nn import bind_branches

    have = bind_branches(model).branches
    missing = [b for b in method.branches if b not in have]
    if missing or len(method.branches) != len(have):
        raise ValueError(
            f"{type(method).__name__} uses the BatchNorm branches {method.branches}; the model has {have}. "
            "Build it with these branches, or convert it: convert_split_bn(model, branches)"
        )
    known = {name for name, _ in model.named_modules()}
    absent = [name for name in method.taps if name not in known]
    if absent:
        raise ValueError(f"{type(method).__name__} taps {absent}; the model has no such layers")
