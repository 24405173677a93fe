"""A training run: epochs, logging, averages, checkpoints, resume."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from arat_fast.analysis.collect import Collector
from arat_fast.config import TrainConfig, to_mapping
from arat_fast.environment import environment
from arat_fast.errors import StopRequested, TrainingError, UserError
from arat_fast.evaluation.accuracy import clean_correct, pgd_correct
from arat_fast.kernels.cpp_library import has_cpp_kernels
from arat_fast.loaders.choose import open_stream
from arat_fast.loaders.images import ImageSet, ImageSource, check_labels
from arat_fast.loaders.stream import WHOLE, Batch, Shard, Stream
from arat_fast.training.adopt import Loader, LoaderStream, OwnData, look_at
from arat_fast.training.augmentation import augmented
from arat_fast.training.averaging import WeightAverage, adversarial_images, recalibrate, swa_due
from arat_fast.training.build import pick_device
from arat_fast.training.checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from arat_fast.training.checks import check_counts, checked, warn_of_radius
from arat_fast.training.directory import LAST_GOOD, RunDirectory, check_same_run
from arat_fast.training.distributed import ALONE, World
from arat_fast.training.engine import build_engine
from arat_fast.training.finite import loss_terms
from arat_fast.training.interrupt import StopSignals
from arat_fast.training.report import describe, summary_writer
from arat_fast.training.schedule import learning_rate, rate_factor, set_learning_rate

log = logging.getLogger(__name__)
BALANCE_BATCHES = 8  # the paper measures `a` on 1,024 images
# Seconds from one checkpoint to the next while a run goes on: the GPU waits for each, and an epoch may take
# less. What a kill -9 may cost is this and an epoch.
SAVE_EVERY = 30.0
STOP_EVERY = 8  # batches between the looks at other processes' signals


class Trainer:
    """One run in one directory, from its configuration and its training images.

    train: the training images; or `loaders`, a DataLoader of float images (N, C, H, W) in [0, 1] and int64
    labels, with `model`, a network of your own: its BatchNorms are given the method's branches, in place.

    `resume` continues from last.pt where there is one: the same batches, crops and attack starts follow, so
    that on CPU an interrupted run ends with the weights of an uninterrupted one, bit for bit.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: ImageSource | None = None,
        run_dir: Path | str | None = None,
        *,
        model: nn.Module | None = None,
        loaders: Loader | None = None,
        resume: bool = False,
        tensorboard: bool = False,
        world: World = ALONE,
    ) -> None:
        self.config = config = checked(config)
        self.world = world
        self.device = pick_device(config.device)
        if run_dir is None:
            raise ValueError("run_dir is None; give the folder of the run")
        if (train is None) == (loaders is None):
            raise ValueError("give the training images as `train`, or a DataLoader as `loaders`; not both")
        local_batch = config.batch_size if config.batch_per_process else world.local_batch(config.batch_size)
        self.train_images: ImageSource | OwnData
        self.validation_images: ImageSet | None = None
        self._source: ImageSource | None = None
        if train is not None:
            self._source, self.validation_images = self._split(config, train)
            self.train_images = self._source
            whole_batch = min(local_batch, world.shard.size(len(self._source)))
        else:
            self.train_images = own_data = self._own_data(loaders, model)
            whole_batch = own_data.batch_size
        self.directory = RunDirectory(Path(run_dir))
        own_network = None if model is None else type(model).__name__
        self._own = {"own_network": own_network, "own_data": loaders is not None}
        self.engine = build_engine(
            config,
            self.train_images.image_shape[2],
            self.train_images.num_classes,
            self.device,
            world,
            resumed=resume and self.directory.last.exists(),
            model=model,
            batch_size=whole_batch,
        )
        self.network, self.optimizer = self.engine.network, self.engine.optimizer
        self.averages: dict[str, WeightAverage] = {}
        if config.averaging.swa_start:
            self.averages["swa"] = WeightAverage(self.network)
        if config.averaging.ema_decay:
            self.averages["ema"] = WeightAverage(self.network, config.averaging.ema_decay)
        self.stream: Stream
        if loaders is None:
            self.stream = self._open_stream(local_batch, world.shard)
        else:
            self.stream = LoaderStream(loaders, config.seed, self.device, self.train_images.num_classes)
        self.epoch, self.batch = 1, 0  # the next iteration's place: epoch from 1, batch from 0
        self.sums: dict[str, Tensor] = {}  # image-weighted metrics of the epoch so far
        self.images_seen, self.seconds = 0, 0.0
        self.wall_seconds = 0.0  # of the epoch, before this process and up to `_begun`
        self._begun = time.perf_counter()
        self.best_accuracy = -1.0
        self.balance: float | None = None  # auto-balance's weight in this epoch
        self.recalibrated: dict[str, dict[str, Tensor]] = {}
        self._saved_at = -math.inf  # the first epoch's end is saved: a disk that refuses shows early
        self._open(resume)
        self.collector = self._make_collector(model)
        tensorboard = tensorboard and world.is_main
        self.writer = summary_writer(self.directory.path / "tensorboard", self.epoch) if tensorboard else None

    def _make_collector(self, model: nn.Module | None) -> Collector | None:
        """What measures gradient conflict on the way, on rank 0; None where it is not asked for."""
        if not self.config.analysis_every or not self.world.is_main:
            return None
        if model is not None:
            raise UserError("analysis_every rebuilds the network from its name; it cannot measure yours")
        collector = Collector(
            self.config.analysis_every,
            self.directory.path,
            config=self.config,
            channels=self.train_images.image_shape[2],
            num_classes=self.train_images.num_classes,
            device=self.device,
        )
        collector.forget_from(self.epoch * len(self.stream) + self.batch)
        return collector

    def _own_data(self, loaders: Loader | None, model: nn.Module | None) -> OwnData:
        if loaders is None or model is None:
            raise ValueError("`loaders` needs `model`: the network that takes its batches")
        if self.world.size > 1:
            raise UserError("several processes share the project's own loaders, not yours: give `train`")
        if self.config.validation or self.config.limit_train:
            raise UserError("validation and limit_train are of the project's own loaders; drop them")
        return look_at(loaders, model)

    @staticmethod
    def _split(config: TrainConfig, train: ImageSource) -> tuple[ImageSource, ImageSet | None]:
        check_labels(train.labels, len(train), train.num_classes, train.source)
        check_counts(config, len(train))
        train = train.first(config.limit_train)
        if not config.validation:
            return train, None
        train, held_out = train.split(config.validation, config.seed)
        return train, held_out.in_memory()

    def _open_stream(self, batch_size: int, shard: Shard) -> Stream:
        config = self.config
        assert self._source is not None
        return open_stream(
            config.loader,
            self._source,
            batch_size=batch_size,
            seed=config.seed,
            device=self.device,
            workers=config.workers,
            shard=shard,
        )

    def _open(self, resume: bool) -> None:
        """Make the directory or take it over; with several processes, rank 0 does and the others follow."""
        continues = self.world.from_main(resume and self.directory.config_file.exists())
        if resume and not continues:
            log.info("%s holds no run yet: starting one", self.directory.path)
        if self.world.is_main and not continues:
            found = environment(self.device) | {"world_size": self.world.size}
            if self.device.type == "cpu" and self.config.engine == "fast":
                found["cpp_kernels"] = has_cpp_kernels()
            self.directory.create(self.config, found | self._own)
        if not continues:
            return
        if self.world.is_main:
            self.directory.lock()
        recorded = self.directory.config()
        check_same_run(recorded, self.config, self.directory.path)
        if self.directory.last.exists():
            self.load_state_dict(load_checkpoint(self.directory.last, self.device))
            log.info("resuming %s at epoch %d, batch %d", self.directory.path, self.epoch, self.batch)
        if self.config.epochs < self.epoch - 1:
            raise UserError(
                f"{self.directory.path} has finished {self.epoch - 1} epochs already, --epochs "
                f"{self.config.epochs} cannot take any back: give at least {self.epoch - 1}"
            )
        if self.world.is_main:
            if recorded != self.config:  # longer, say: a later --resume without flags goes on to that end
                self.directory.write_config(self.config)
            self.directory.forget_metrics_after(self.epoch - 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "config": to_mapping(self.config),
            "image_shape": list(self.train_images.image_shape),
            "num_classes": self.train_images.num_classes,
            "training_images": len(self.train_images),
            "epoch": self.epoch,
            "batch": self.batch,
            "method": self.engine.state(),
            "optimizer": self.optimizer.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "recalibrated": self.recalibrated,
            "sums": self.sums,
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "wall_seconds": self._wall(),
            "best_accuracy": self.best_accuracy,
            "balance": self.balance,
            "seed": self.config.seed,
            "random": random_state(self.device),
        }

    def _wall(self) -> float:
        return self.wall_seconds + time.perf_counter() - self._begun

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises UserError when it belongs to another network, method or data set."""
        if state["training_images"] != len(self.train_images):
            raise UserError(
                f"{self.directory.last} was trained on {state['training_images']} images, "
                f"the data set now has {len(self.train_images)}: give the same data"
            )
        try:
            self.engine.load_state(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, average in self.averages.items():
                average.load_state_dict(state["averages"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            first = str(error).split("\n")[0]
            raise UserError(f"{self.directory.last} does not fit this run's network: {first}") from None
        if self.world.size == 1:  # another process drew other numbers
            restore_random_state(state.get("random", {}), self.device)
        for name in (
            "epoch",
            "batch",
            "sums",
            "images_seen",
            "seconds",
            "best_accuracy",
            "balance",
            "recalibrated",
        ):
            setattr(self, name, state[name])
        self.wall_seconds = state.get("wall_seconds", self.seconds)  # not in older checkpoints

    def save(self) -> None:
        """Write last.pt, atomically; rank 0's statistics are everybody's then."""
        if self.world.is_main:
            save_checkpoint(self.directory.last, self.state_dict())
        self._saved_at = time.monotonic()
        self.world.barrier()

    def run(self) -> None:
        """Train to the last epoch, then let go of the directory. Returns at once when the run is complete.

        Raises StopRequested after Ctrl-C or SIGTERM, and TrainingError for a non-finite loss; the state is
        saved.
        """
        try:
            self._run()
        finally:
            self.directory.release()

    def _run(self) -> None:
        if self.epoch <= self.config.epochs and self.world.is_main:
            warn_of_radius(self.config)
        self._begun = time.perf_counter()
        with StopSignals() as signals:
            while self.epoch <= self.config.epochs:
                self._train_epoch(signals)
        for name, average in self.averages.items():
            if not average.count:
                log.warning(
                    "the %s average took no snapshot, and the run has none: --averaging.swa-every %d is too "
                    "large; give a smaller one, or more --epochs", name, self.config.averaging.swa_every,
                )  # fmt: skip
            elif name not in self.recalibrated:
                self._recalibrate(name)

    def _train_epoch(self, signals: StopSignals) -> None:
        self.recalibrated = {}  # of a shorter run: the averages move on
        rate = learning_rate(self.config, self.epoch)
        if self.config.batch_per_process:
            rate *= self.world.size
        set_learning_rate(self.optimizer, rate)
        self.engine.start_epoch(self.epoch, rate_factor(self.config, self.epoch))
        if self.batch == 0:
            self.balance = self._balance()
        bar = tqdm(
            total=len(self.stream),
            initial=self.batch,
            desc=f"epoch {self.epoch}/{self.config.epochs}",
            unit="batch",
            leave=False,
            disable=None if self.world.is_main else True,
        )
        with bar:
            batches = self.stream.epoch(self.epoch, self.batch)
            started = time.perf_counter()
            for batch in batches:
                self._iterate(batch)
                bar.update()
                if self._must_stop(signals) and self.batch < len(self.stream):
                    self._synchronise()
                    self.seconds += time.perf_counter() - started
                    self._stop(signals.received or signal.SIGTERM)
        self._synchronise()
        self.seconds += time.perf_counter() - started
        self._raise_if_not_finite()
        self._end_epoch(rate, self.balance)
        if self.world.any(signals.received is not None):
            self._stop(signals.received or signal.SIGTERM)

    def _must_stop(self, signals: StopSignals) -> bool:
        """Whether a signal came, to any process: all of them stop after the same batch."""
        if self.world.size > 1 and self.batch % STOP_EVERY:
            return False
        return self.world.any(signals.received is not None)

    def _balance(self) -> float | None:
        first = itertools.islice(self.stream.epoch(self.epoch), BALANCE_BATCHES)
        return self.engine.set_balance(first, self.epoch)

    def _iterate(self, batch: Batch) -> None:
        step = self.epoch * len(self.stream) + self.batch
        metrics = self.engine.iterate(batch, self.epoch, step)
        # The terms, not their sum: the message names the one that failed first.
        self._terms = loss_terms(metrics)
        if not self.sums:
            self.sums = {name: torch.zeros_like(value) for name, value in metrics.items()}
        count = float(len(batch.labels))
        torch._foreach_add_(list(self.sums.values()), torch._foreach_mul(list(metrics.values()), count))
        self.images_seen += len(batch.labels)
        if self.collector is not None:
            self.collector.after_step(
                step,
                self.epoch,
                state=self.engine.state,
                batch=lambda: (augmented(self.config, batch, self.epoch), batch.labels),
            )
        averaging = self.config.averaging
        if swa_due(averaging.swa_start, averaging.swa_every, self.epoch, self.batch, len(self.stream)):
            self.averages["swa"].update(self.network)
        if "ema" in self.averages:
            self.averages["ema"].update(self.network)
        self.batch += 1

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _raise_if_not_finite(self) -> None:
        guard = self.engine.guard
        failure = None if guard is None else guard.failure(self._terms)
        if failure is None:
            return
        step, what = failure
        epoch, batch = divmod(step, len(self.stream))
        # Last good weights; the counters say where a resumed run would meet the same batch again.
        self.epoch, self.batch, self.sums, self.images_seen = epoch, batch, {}, 0
        path = self.directory.path / LAST_GOOD
        if self.world.is_main:
            save_checkpoint(path, self.state_dict())
        self.world.barrier()
        done = (epoch - 1) * len(self.stream) + batch
        raise TrainingError(
            f"{what} is not finite in iteration {done + 1} (epoch {epoch}, batch {batch + 1}); the weights "
            f"before it are in {path}. Lower --learning-rate, or check the data"
        )

    def _stop(self, number: int) -> None:
        self._synchronise()
        self._raise_if_not_finite()
        self.save()
        raise StopRequested(
            f"stopped in epoch {self.epoch} of {self.config.epochs} and saved; continue with "
            f"--run-dir {self.directory.path} --resume",
            128 + number,
        )

    def _end_epoch(self, rate: float, balance: float | None) -> None:
        line: dict[str, Any] = {"epoch": self.epoch}
        totals = self.world.total(torch.stack([total.double() for total in self.sums.values()]))
        images = self.images_seen * self.world.size
        line |= {name: float(t) / images for name, t in zip(self.sums, totals, strict=True)}
        line |= {"learning_rate": rate, "images_per_second": images / max(self.seconds, 1e-9)}
        line["seconds"] = self.seconds
        if balance is not None:
            line["balance"] = balance
        if self.validation_images is not None:
            line |= self.world.from_main(self._validate(self.validation_images) if self.world.is_main else {})
        if self.collector is not None:
            step = self.epoch * len(self.stream) + self.batch - 1
            self.collector.end_epoch(self.epoch, step, state=self.engine.state)
        line["wall_seconds"] = self._wall()  # what comes after this is the next epoch's
        self.wall_seconds, self._begun = 0.0, time.perf_counter()
        if self.world.is_main:
            self.directory.append_metrics(line)
        log.info("%s", describe(line, self.config.epochs))
        if self.writer is not None:
            for name, value in line.items():
                self.writer.add_scalar(name, value, self.epoch)
            self.writer.flush()
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.images_seen, self.seconds = {}, 0, 0.0
        is_best = line.get("validation_pgd", -1.0) > self.best_accuracy
        if is_best:
            self.best_accuracy = line["validation_pgd"]
            if self.world.is_main:
                save_checkpoint(self.directory.best, self.state_dict())
        is_last = self.epoch > self.config.epochs
        # Every process does what rank 0's clock says: they meet in `save`.
        if self.world.from_main(is_best or is_last or time.monotonic() - self._saved_at >= SAVE_EVERY):
            self.save()

    def _validate(self, images: ImageSet) -> dict[str, float]:
        evaluation = self.config.evaluation
        network = self.engine.plain_network()
        clean = clean_correct(network, images, batch_size=evaluation.batch_size, device=self.device)
        robust = pgd_correct(
            network,
            images,
            eps=evaluation.eps,
            alpha=evaluation.alpha,
            steps=self.config.attack.steps,
            norm=evaluation.norm,
            batch_size=evaluation.batch_size,
            device=self.device,
        )
        return {
            "validation_clean": float(clean.float().mean()),
            "validation_pgd": float(robust.float().mean()),
        }

    def _recalibrate(self, name: str) -> None:
        """Measure the average's statistics: an epoch of adversarial examples through the adv branch."""
        log.info("recalibrating BatchNorm statistics of the %s weights", name)
        network = self.engine.plain_network(self.averages[name].values)
        if self.world.is_main:
            whole = self.stream if self.world.size == 1 else self._open_stream(self.config.batch_size, WHOLE)
            epoch = self.config.epochs + 1
            recalibrate(network, adversarial_images(self.config, network, whole.epoch(epoch), epoch))
        self.recalibrated[name] = network.state_dict()
        self.wall_seconds, self._begun = 0.0, time.perf_counter()  # of no epoch
        self.save()
