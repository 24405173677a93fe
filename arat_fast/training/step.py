"""One training iteration on the fast path: augmentation, attack, one forward of [clean; adv], loss, backward,
step.

The same mathematics as `arat_fast.reference.train_step`, as one object that any loop can call. What makes it
fast: channels-last activations through the fused split BatchNorm, both kinds of images in one batch, an
attack that computes input gradients only, weights cast once an iteration, compiled passes (one attack step
called K times, one training pass), and on a GPU all of it replayed as one CUDA graph.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from arat_fast.config import AttackConfig, checked_attack, resolved_attack
from arat_fast.kernels.augment import random_crop_flip
from arat_fast.kernels.dispatch import on_device
from arat_fast.methods.base import Method, Outputs
from arat_fast.nn import bn_mode, use_branch
from arat_fast.training.algorithm_search import algorithm_search
from arat_fast.training.attack_pass import AttackPass
from arat_fast.training.capture import (
    CannotCapture,
    CapturedIteration,
    CudaGraph,
    Graph,
    held_by_an_older_graph,
    in_order,
    make_capturable,
)
from arat_fast.training.compiled import compiled_pass, tracing
from arat_fast.training.distributed import ALONE, World, averaged_over_ranks, start_alike
from arat_fast.training.finite import FiniteGuard, loss_terms
from arat_fast.training.first_look import check_values, try_forward, two_images
from arat_fast.training.model_watch import ModelWatch
from arat_fast.training.momentum import start_momentum
from arat_fast.training.precision import (
    DTYPES,
    LowPrecisionTwin,
    Precision,
    can_be_cast,
    resolve_precision,
)
from arat_fast.training.recorded_optimizer import RecordedOptimizer
from arat_fast.training.step_checks import check_branches, check_optimizer
from arat_fast.training.taps import TapHooks

log = logging.getLogger(__name__)
MOST_GRAPHS = 2  # each holds buffers of its own


class TrainStep:
    """A training iteration: `metrics = step(images, labels)`.

    Args:
        model: a network of `arat_fast.models`, or any whose BatchNorms are `SplitBatchNorm2d`, or that has
            none; channels-last. Layers that cannot be cast (LayerNorm, attention) run under autocast.
        method: the objective. Its branches must be the model's.
        optimizer: over the parameters of model and method; its state may be restored before the first call.
        attack: radius, steps, loss, start and BatchNorm mode of the attack.
        precision: of convolutions and classifier; "auto" picks bf16 where it is fast, under autocast where
            the model fails when it is cast. fp32 and tf32 compute in float32; which of the two is torch's own
            setting.
        compiled: use torch.compile on batches of `batch_size` images; other sizes run eagerly.
        batch_size: images of a whole batch; None: the first batch's. Tell it to a step that may start with an
            epoch's last, smaller batch, as that of a resumed run.
        joined: in compiled passes, let BatchNorm's backward add the two gradients of a block's output.
        capture: on a GPU, replay batches as one CUDA graph, one for each of the first two sizes: whole
            batches, and the last of an epoch; anew where the method's plan changes. Where that cannot be, a
            warning says why. Learning rates then become device tensors, which numbers set by hand are copied
            into; of the optimizer's other settings and of requires_grad none may change then.
        padding, flip: augmentation of uint8 batches.
        seed: of crops and attack starts.
        world: the processes that share every batch: gradients are averaged over them, each draws attack
            starts of its own, and nothing is captured.
        guard: undo, on the device, the first iteration whose loss or weights are not finite and all later
            ones (`FiniteGuard`).

    Images are uint8 (N, H, W, C) with `indices`, which are augmented (with `resident` the whole data set, of
    which `indices` are gathered), or float (N, C, H, W) in [0, 1], taken as they are. Metrics are 0-d device
    tensors, valid until the next call; nothing waits for the device.

    Raises ValueError when the method needs branches or taps that the model lacks, when the optimizer lacks a
    trainable parameter of either, and for an attack that is none, before anything has changed; TypeError or
    ValueError at the first call for a model that gives no logits (N, classes), and for float images outside
    [0, 1] or with labels of no class. Later batches' values are not read: that would wait for the device.
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
        joined: bool = True,
        capture: bool = True,
        padding: int = 4,
        flip: bool = True,
        seed: int = 0,
        world: World = ALONE,
        guard: bool = False,
        batch_size: int | None = None,
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.exact = parameter.device, parameter.dtype is torch.float64
        self.model, self.method, self.optimizer = model, method, optimizer
        self.settings = resolved_attack(checked_attack(attack), method.name)
        self.padding, self.flip = padding, flip
        check_branches(model, method)
        check_optimizer(model, method, optimizer)
        self._asked, self.precision = precision, resolve_precision(precision, self.device)
        # Counters on the device, so that a replayed graph counts on; their values on the host beside them.
        self.step, self.epoch, self.seed = (
            torch.tensor(value, dtype=torch.int64, device=self.device) for value in (0, 1, seed)
        )
        self._watch = ModelWatch(model)
        self._world = world
        start_alike(world, model, method)
        self._at = (1, 0)
        dtype = parameter.dtype if self.exact else DTYPES[self.precision]
        scaled = dtype is torch.float16
        self._build(dtype, under_autocast=dtype.itemsize == 2 and not can_be_cast(model))
        self.scaler = (
            torch.amp.GradScaler(self.device.type) if scaled else None  # type: ignore[attr-defined]
        )
        self.guard: FiniteGuard | None = None
        self._guarded = guard
        self._begun = False
        self._compile, self._joined = compiled, joined
        self._capture = capture and self.device.type == "cuda" and world.size == 1
        self._make_graph: Callable[[Graph | None], Graph] = CudaGraph
        self.captured: list[CapturedIteration] = []
        self._whole = batch_size
        self._recorded_plan: tuple[str, ...] = ()
        self._recorded: RecordedOptimizer | None = None
        self._compiled_for: torch.Size | None = None
        self._compiled_forward = self._training_forward

    def _build(self, dtype: torch.dtype, under_autocast: bool) -> None:
        """The passes, computing in `dtype`: by a cast copy of the model, or by itself under autocast."""
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if under_autocast:
            self.autocast, dtype = partial(torch.autocast, self.device.type, dtype), torch.float32
        self.dtype = self.method.compute = dtype  # also of a second network's convolutions
        self.twin = LowPrecisionTwin(self.model, dtype)
        rank = self._world.rank
        self.attack = AttackPass(
            self.model,
            self.twin,
            self.settings,
            dtype=dtype,
            seed=self.seed if rank == 0 else self.seed + (rank << 32),
            offset=self.step,
            autocast=self.autocast,
        )
        self.taps = TapHooks(self.twin.module, self.method.taps)
        self._averaged = averaged_over_ranks(self.twin.module, self.method, self._world)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        resident: bool = False,
        x_adv: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One iteration. `x_adv`, when given, takes the place of the attack's images."""
        self._check_batch(images, labels, indices, resident)
        if self._whole is None:
            self._whole = len(labels)
        with on_device(self.step), algorithm_search(self._whole == len(labels)):
            return self._call(images, labels, indices, resident, x_adv)

    def _call(
        self, images: Tensor, labels: Tensor, indices: Tensor | None, resident: bool, x_adv: Tensor | None
    ) -> dict[str, Tensor]:
        self._watch.refuse()
        if self._watch.moved():
            self.attack.folded = None
            if self.guard is not None:
                self._start_guard()
            self._record_anew()
        if not self._begun:
            self._look(images, labels)
            self._begin()
        if self._recorded_plan != self.method.plan or self._watch.changed():
            self._record_anew()
        if self._recorded is not None:
            self._recorded.follow()
        if self._compile and self._compiled_for is None and self._whole == len(labels):
            self._compile_for(images, labels)
        self._at = (self._at[0], self._at[1] + 1)
        if x_adv is not None:
            return self._iterate(images, labels, indices, resident, x_adv)
        inputs = (images, labels, indices)
        fitting = self._fitting(inputs)
        if fitting is None and self._capture and len(self.captured) < MOST_GRAPHS:
            self._try_capture(inputs, resident)
            fitting = self._fitting(inputs)
        return self._iterate(images, labels, indices, resident) if fitting is None else fitting(inputs)

    def _record_anew(self) -> None:
        """Any graphs are of other forwards. What could be recorded once is recorded anew."""
        if self.captured:
            self.captured.clear()
            self._recorded, self._capture = None, True

    def _fitting(self, inputs: tuple[Tensor, Tensor, Tensor | None]) -> CapturedIteration | None:
        return next((captured for captured in self.captured if captured.fits(inputs)), None)

    def is_compiled(self, count: int) -> bool:
        """Whether batches of `count` images run compiled."""
        return self._compiled_for == (count,)

    def seek(self, epoch: int, step: int) -> None:
        """Set the counters that crops and attack starts are drawn from; does nothing where they are there."""
        if self._at[0] != epoch:
            self.epoch.fill_(epoch)
        if self._at[1] != step:
            self.step.fill_(step)
        self._at = (epoch, step)

    def state(self) -> list[Tensor]:
        """Every tensor that an iteration changes."""
        modules = (self.model, self.method)
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        tensors += [self.step]
        if self.guard is not None:
            tensors += [self.guard.step, self.guard.term]
        if self.scaler is not None:
            tensors += [t for t in (self.scaler._scale, self.scaler._growth_tracker) if t is not None]
        for values in self.optimizer.state.values():
            tensors += [v for v in values.values() if isinstance(v, Tensor)]
        return tensors

    def _check_batch(self, images: Tensor, labels: Tensor, indices: Tensor | None, resident: bool) -> None:
        if images.dtype == torch.uint8:
            if indices is None:
                raise ValueError("uint8 images need indices: their crops and flips are hashed from them")
        elif images.dtype != (wanted := torch.float64 if self.exact else torch.float32):
            raise ValueError(f"images are {images.dtype}; expected uint8 with indices, or {wanted}")
        if images.device != self.device or labels.device != self.device:
            raise ValueError(
                f"images are on {images.device} and labels on {labels.device}; expected {self.device}"
            )
        count = len(indices) if resident and indices is not None else len(images)
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected int64 ({count},)"
            )

    def _look(self, images: Tensor, labels: Tensor) -> None:
        """Before the first iteration, once: the batch's values, and whether the model computes as asked."""
        if not len(labels):
            return
        x = two_images(images, torch.float64 if self.exact else torch.float32)
        self.twin.refresh()
        try:
            with algorithm_search(False):
                logits = try_forward(self.twin.module, x.to(self.dtype), self.autocast)
        except RuntimeError as error:
            if self.twin.module is self.model:
                raise
            logits = try_forward(self.model, x, nullcontext)  # where this fails too, precision is not why
            name, reason = type(self.model).__name__, str(error).split("\n")[0]
            if self._asked != "auto":
                raise ValueError(
                    f"{name} does not compute in {self.precision}: {reason}. Make tensors that it holds as "
                    "attributes buffers (register_buffer), or choose precision 'auto' or 'fp32'"
                ) from error
            log.warning("%s runs under autocast, since cast to %s it fails: %s", name, self.precision, reason)
            eps, alpha = self.attack.eps, self.attack.alpha
            self._build(self.dtype, under_autocast=True)
            self.attack.eps, self.attack.alpha = eps, alpha
        check_values(images, labels, logits.shape[1])

    def _begin(self) -> None:
        """Before the first iteration, when the optimizer's state is there."""
        self._begun = True
        if self._guarded or self.scaler is not None:
            start_momentum(self.optimizer)
        if self._guarded:
            self._start_guard()

    def _start_guard(self) -> None:
        modules = (self.model, self.method)
        weights = [p.detach() for m in modules for p in m.parameters()]
        others = [b for m in modules for b in m.buffers()]
        for values in self.optimizer.state.values():
            others += [v for v in values.values() if isinstance(v, Tensor)]
        before, self.guard = self.guard, FiniteGuard(weights, others, self._world.group)
        if before is not None:
            self.guard.step, self.guard.term = before.step, before.term

    def _compile_for(self, images: Tensor, labels: Tensor) -> None:
        self.attack.compile(self._joined)
        self._compiled_forward = compiled_pass(self._training_forward, self._joined)
        self._compiled_for = labels.shape

    def _try_capture(self, inputs: tuple[Tensor, Tensor, Tensor | None], resident: bool) -> None:
        """Record this batch's iteration; on failure warn, and record no other."""
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self.device))  # makes its tensors
        gc.collect()
        try:
            if held_by_an_older_graph([*self.twin.module.parameters(), *self.method.parameters()]):
                raise CannotCapture(
                    "a loss or an output of the model, or a copy of a parameter, is still referenced with "
                    "its autograd graph; delete or detach it before the first iteration"
                )
            make_capturable(self.optimizer, self.device)
            captured = CapturedIteration(
                lambda images, labels, indices: self._iterate(images, labels, indices, resident),
                inputs,
                (resident, False, False),
                self.state,
                self._make_graph(self.captured[0].graph if self.captured else None),
            )
            self.captured.append(captured)
            self._recorded = self._recorded or RecordedOptimizer(self.optimizer)
            self._recorded_plan = self.method.plan
            self._watch.remember()
            return
        except CannotCapture as refusal:
            reason = str(refusal)
        except RuntimeError as error:
            log.debug("capture failed", exc_info=True)
            reason = "capture failed: " + in_order(error)
        self._capture = False
        which = f"batches of {len(inputs[1])} images" if self.captured else "training"
        log.warning("%s without a CUDA graph: %s", which, reason)

    def _iterate(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None,
        resident: bool,
        x_adv: Tensor | None = None,
    ) -> dict[str, Tensor]:
        compiled = self.is_compiled(len(labels))
        if indices is not None:
            images = random_crop_flip(
                images,
                indices,
                seed=self.seed,
                epoch=self.epoch,
                padding=self.padding,
                flip=self.flip,
                resident=resident,
            )
        else:
            images = images.contiguous(memory_format=torch.channels_last)
        if x_adv is not None:
            x_adv = x_adv.contiguous(memory_format=torch.channels_last)
        if self.guard is not None:
            self.guard.before()
        self.twin.refresh()
        if self.method.attacks and x_adv is None:
            images, x_adv = self.attack(images, labels, compiled)
        metrics = self._train(images, x_adv if self.method.attacks else None, labels, compiled)
        if self.guard is not None:
            self.guard.after([metrics[name] for name in loss_terms(metrics)], self.step)
        self.step.add_(1)
        return metrics

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
        with self.autocast():
            logits, taps = self.taps(torch.cat(chosen) if len(chosen) > 1 else chosen[0])
        logits = self._wide(logits)
        outputs = Outputs(images=images, x_adv=x_adv, network=self._inference)
        count = len(chosen)
        for k, name in enumerate(method.plan):
            features = {tap: value.chunk(count)[k] for tap, value in taps.items()}
            if name == "clean":
                outputs.clean, outputs.taps_clean = logits.chunk(count)[k], features
            else:
                outputs.adv, outputs.taps_adv = logits.chunk(count)[k], features
        terms = method.loss(outputs, labels)
        outputs.network = None  # what leaves a compiled pass are tensors
        return terms, outputs

    def _inference(self, x: Tensor) -> Tensor:
        """Logits by running statistics of the inference branch; differentiable twice."""
        branch = "adv" if "adv" in self.method.branches else self.method.branches[-1]
        with use_branch(self.model, branch), bn_mode(self.model, "running"), self.autocast():
            return self._wide(self.twin.module(x.to(self.dtype)))

    def _train(
        self, images: Tensor, x_adv: Tensor | None, labels: Tensor, compiled: bool
    ) -> dict[str, Tensor]:
        method, model = self.method, self.model
        method.train()
        split = len(method.branches) > 1
        branch, parts = ("both", 1) if split else (method.branches[0], len(method.plan))
        forward = self._compiled_forward if compiled else self._training_forward
        if self._averaged is not None:
            forward = partial(self._averaged, forward)
        self.optimizer.zero_grad(set_to_none=True)
        with (
            use_branch(model, branch, parts),
            bn_mode(model, "batch", update=True),
            tracing(),
        ):
            terms, outputs = forward(images, x_adv, labels)
            total = torch.stack(list(terms.values())).sum()
            (total if self.scaler is None else self.scaler.scale(total)).backward()
        if method.repeats_clean:
            with torch.no_grad(), use_branch(model, method.branches[0]), bn_mode(model, "batch", update=True):
                self.twin.module(images.to(self.dtype))
        self.twin.gather_gradients()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        metrics = {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}
        for name in method.plan:
            logits = outputs.clean if name == "clean" else outputs.adv
            assert logits is not None
            metrics[f"accuracy_{name}"] = (logits.detach().argmax(1) == labels).float().mean()
        return metrics
