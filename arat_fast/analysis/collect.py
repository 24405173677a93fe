"""Collection while training, into analysis.jsonl of the run directory: gradient conflict every N iterations,
and BatchNorm's running means at the end of each epoch.

A collection attacks the batch and differentiates the loss twice on a copy of the network in plain PyTorch,
with random numbers of its own: training goes on to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arat_fast import reference
from arat_fast.analysis.gradient_conflict import load_method, measure_conflict, reference_method
from arat_fast.analysis.images import attack_as_trained
from arat_fast.config import TrainConfig
from arat_fast.errors import TrainingError, UserError
from arat_fast.loaders.stream import counter_seed
from arat_fast.training.build import build_network
from arat_fast.training.schedule import warm_up_factor

log = logging.getLogger(__name__)
FILE = "analysis.jsonl"
State = dict[str, Tensor]
_STREAM = 7  # sets the starts apart from those of training, which are seeded by (seed, step)


@dataclass(frozen=True)
class Collected:
    """What a run collected: `conflict` lines by iteration, `snapshots` of running means by epoch."""

    conflict: list[dict[str, Any]]
    snapshots: list[dict[str, Any]]


def running_means(state: State) -> dict[str, dict[str, list[float]]]:
    """branch -> layer -> running mean, of a method's state in the reference's names (`network.…`).

    Branches are clean and adv; a network with one BatchNorm for both has adv alone. Six digits.
    """
    branches: dict[str, dict[str, list[float]]] = {}
    for key, value in state.items():
        if not (key.startswith("network.") and key.endswith(".running_mean")):
            continue
        layer = key.removeprefix("network.").removesuffix(".running_mean")
        layer, dot, branch = layer.rpartition(".")
        if branch not in reference.BRANCHES:
            layer, branch = f"{layer}{dot}{branch}", "adv"
        branches.setdefault(branch, {})[layer] = [float(f"{v:.6g}") for v in value.tolist()]
    return branches


class Collector:
    """Writes one run's analysis.jsonl.

    Args:
        every: iterations between two measurements of gradient conflict, those whose step it divides.
        run_dir: folder of the run.
        config: the run's, for its method and training attack.
        channels, num_classes: of its images.
        device: where to measure.

    `state` gives the method's state in the reference's names, as a checkpoint's "method" entry, and `batch`
    the iteration's images in [0, 1] (N, C, H, W) and labels; both are called only when a measurement is due.
    A method without an invariance term has its running means collected alone.

    Raises ValueError when `every` is not positive.
    """

    def __init__(
        self,
        every: int,
        run_dir: Path,
        *,
        config: TrainConfig,
        channels: int,
        num_classes: int,
        device: torch.device,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; expected a number of iterations, at least 1")
        self.every, self.file, self.config, self.device = every, run_dir / FILE, config, device
        self._twin: reference.ARAT | None = None
        try:
            self._twin = reference_method(config, build_network(config, channels, num_classes).to(device))
        except UserError as error:
            log.info("analysis: %s; only running means are collected", error)

    def after_step(
        self,
        step: int,
        epoch: int,
        *,
        state: Callable[[], State],
        batch: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        """Measure gradient conflict if it is due at `step`, which numbers iterations over the whole run.

        Raises TrainingError when the disk refuses.
        """
        if self._twin is None or step % self.every:
            return
        started = time.perf_counter()
        load_method(self._twin, state())
        images, labels = batch()
        generator = torch.Generator(self.device).manual_seed(counter_seed(self.config.seed, step, _STREAM))
        config, network = self.config, self._twin.network
        scale = warm_up_factor(config, epoch)
        centre, x_adv = attack_as_trained(
            network, images, labels, config.attack, config.method, generator, scale
        )
        measured = measure_conflict(self._twin, centre, x_adv, labels)["trained"].as_json()
        seconds = round(time.perf_counter() - started, 4)
        self._append({"kind": "conflict", "epoch": epoch, "step": step, "seconds": seconds} | measured)

    def end_epoch(self, epoch: int, step: int, *, state: Callable[[], State]) -> None:
        """Record the running means; `step` is the epoch's last. Raises TrainingError when the disk
        refuses.
        """
        self._append(
            {"kind": "running_mean", "epoch": epoch, "step": step, "branches": running_means(state())}
        )

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.file}: {error.strerror}. Make room, then continue with --resume"
            ) from error

    def forget_from(self, step: int) -> None:
        """Drop the lines of `step` and later ones: they will be trained, and collected, again."""
        if not self.file.exists():
            return
        kept = [line for line in _lines(self.file) if line["step"] < step]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.file)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The file's lines; a last one that a crash cut short is left out."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def collected(run_dir: Path) -> Collected:
    """What the run collected while it trained; empty where it did not."""
    file = run_dir / FILE
    lines = _lines(file) if file.is_file() else []
    return Collected(
        [line for line in lines if line["kind"] == "conflict"],
        [line for line in lines if line["kind"] == "running_mean"],
    )
