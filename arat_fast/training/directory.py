"""A run directory: config.json, environment.json, metrics.jsonl, last.pt, and a lock while the run lives."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import IO, Any, TypeGuard

from arat_fast.config import TrainConfig, load_recipe, save_json, to_mapping
from arat_fast.errors import TrainingError, UserError

log = logging.getLogger(__name__)
LAST_GOOD = "last_good.pt"  # kept beside last.pt when a loss stops being finite
METRICS = ("epoch", "loss", "images_per_second", "seconds")  # of each line of metrics.jsonl
# A resumed run may differ in these; anything else would make it another run.
FREE_KEYS = (
    "epochs",
    "data_root",
    "device",
    "loader",
    "workers",
    "threads",
    "compile",
    "capture",
    "evaluation",
    "analysis_every",
)


class RunDirectory:
    """Files of one training run. One process at a time holds it; a dead one's hold is freed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def config_file(self) -> Path:
        """config.json."""
        return self.path / "config.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint, the one that is reported."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation accuracy, where a validation split was asked for."""
        return self.path / "best.pt"

    @property
    def metrics_file(self) -> Path:
        """metrics.jsonl: a line an epoch."""
        return self.path / "metrics.jsonl"

    def config(self) -> TrainConfig:
        """The run's configuration. Raises UserError when the directory holds no run, or a damaged one."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is no run directory: it has no config.json")
        return load_recipe(str(self.config_file))

    def own_network(self) -> str | None:
        """The class of the network that a caller of `Trainer` brought; None for those of arat-fast."""
        name = self._environment().get("own_network")
        return None if name is None else str(name)

    def trained(self, config: TrainConfig) -> tuple[str, str]:
        """(model, data set) as the run's lists show them: a caller's own are not the configuration's."""
        own_data = bool(self._environment().get("own_data"))
        return self.own_network() or config.model, "own data" if own_data else config.dataset

    def _environment(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def check_network(self) -> None:
        """Raise UserError where only the caller of `Trainer` can build the network."""
        name = self.own_network()
        if name is not None:
            raise UserError(
                f"{self.path} trained a network of yours, {name}, which arat-fast cannot build: load its "
                "weights with arat_fast.load_weights(model, 'last.pt')"
            )

    def create(self, config: TrainConfig, environment: dict[str, object]) -> None:
        """Make the directory and write config.json and environment.json.

        Raises UserError when it already holds a run, or anything else, or cannot be written.
        """
        if self.config_file.exists():
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume, or give another --run-dir"
            )
        try:
            if self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty: give a new or empty --run-dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            (self.path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
            # Last: a directory with a config.json is a run that can be resumed.
            self.write_config(config)
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.path}: {error.strerror}; give another --run-dir"
            ) from None

    def write_config(self, config: TrainConfig) -> None:
        """Write config.json whole or not at all. Raises UserError when it cannot be written."""
        temporary = self.path / "config.json.tmp"
        try:
            save_json(config, temporary)
            temporary.replace(self.config_file)
        except OSError as error:
            raise UserError(f"cannot write {self.config_file}: {error.strerror}; make room there") from None

    def lock(self) -> None:
        """Hold the directory for this process. Raises UserError when another process does."""
        if self._lock is not None:
            return
        try:
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.path}: {error.strerror}; give another --run-dir"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"{self.path} is being written by another process; wait for it or stop it"
            ) from None
        self._lock = file

    def release(self) -> None:
        """Let other processes have the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_held(self) -> bool:
        """Whether some process is running this run now."""
        try:
            with (self.path / ".lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut short is left out.

        Raises UserError where the file cannot be read, or a line is not an epoch's metrics.
        """
        if not self.metrics_file.exists():
            return []
        try:
            text = self.metrics_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {self.metrics_file} ({error}): restore or remove it") from None
        lines: list[dict[str, Any]] = []
        written = text.splitlines()
        for number, line in enumerate(written, 1):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                if number == len(written):
                    break
                values = None
            if not _is_metrics(values):
                raise UserError(
                    f"{self.metrics_file}, line {number}, is damaged: expected an object with the numbers "
                    f"{', '.join(METRICS)}; restore a copy, or remove the line"
                )
            lines.append(values)
        return lines

    def results_file(self, method: str) -> Path:
        """results.json: in the run's folder; above it for the standard network of `train --with-standard`."""
        own = self.path / "results.json"
        folder = self.path.absolute()
        trained_along = method == folder.name == "standard" and (folder.parent / "config.json").is_file()
        return folder.parent / "results.json" if trained_along and not own.exists() else own

    def results(self, method: str) -> dict[str, float]:
        """Accuracies in [0, 1] at the end of training, and n, the number of images; empty where none were
        measured.

        A results.json that is damaged is left out with a warning.
        """
        file = self.results_file(method)
        if not file.exists():
            return {}
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict) or not _are_results(record.get(method, {"n": 1})):
            log.warning("%s is damaged and is left out: restore or remove it", file)
            return {}
        # A standard network above has its figures alone there: they are not this folder's.
        if file.parent != self.path and set(record) == {"standard"}:
            return {}
        return dict(record.get(method, {}))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one epoch's line. Raises TrainingError when the disk refuses."""
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.metrics_file}: {error.strerror}. Make room, then continue with --resume"
            ) from error

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the lines of epochs that will be trained again after a resume."""
        kept = [line for line in self.metrics() if line["epoch"] <= epoch]
        temporary = self.metrics_file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.metrics_file)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_metrics(values: object) -> bool:
    """Whether a line of metrics.jsonl holds what every epoch's line does."""
    return (
        isinstance(values, dict)
        and all(_is_number(values.get(key)) for key in METRICS)
        and isinstance(values["epoch"], int)
        and _is_number(values.get("wall_seconds", 0.0))
    )


def is_figure(accuracy: object, count: object) -> bool:
    """Whether a record's values are an accuracy in [0, 1] and a number of images."""
    return (
        _is_number(accuracy) and _is_number(count) and isinstance(count, int) and 0 <= accuracy <= 1 <= count
    )


def _are_results(values: object) -> bool:
    """Whether a method's part of results.json is accuracies and n."""
    if not isinstance(values, dict):
        return False
    count = values.get("n")
    return is_figure(0.0, count) and all(is_figure(v, count) for k, v in values.items() if k != "n")


def check_same_run(before: TrainConfig, now: TrainConfig, path: Path) -> None:
    """Raise UserError when `now` would not go on with the run in `path`, which was begun with `before`."""
    old, new = to_mapping(before), to_mapping(now)
    changed = [
        f"{key} was {old[key]!r} and is now {new[key]!r}"
        for key in old
        if key not in FREE_KEYS and old[key] != new[key]
    ]
    if changed:
        raise UserError(
            f"{path} was started with another configuration ({'; '.join(changed)}): drop those flags to "
            "continue it, or give another --run-dir"
        )
