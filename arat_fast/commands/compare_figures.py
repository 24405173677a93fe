"""What lies in a run's folder about its accuracy, speed and length: one run of `arat-fast compare`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from arat_fast.analysis.labels import description
from arat_fast.config import TrainConfig
from arat_fast.evaluation.options import PGD
from arat_fast.evaluation.record import binomial_error, sha256_of
from arat_fast.pixels import format_pixels
from arat_fast.training.directory import RunDirectory, is_figure

log = logging.getLogger(__name__)
Figures = dict[str, dict[str, Any]]


def _summary_figures(directory: RunDirectory, config: TrainConfig) -> Figures:
    """Figures of results.json, of the end of training."""
    figures = directory.results(config.method)
    if not figures:
        return {}
    file = directory.results_file(config.method)
    if directory.last.is_file() and directory.last.stat().st_mtime > file.stat().st_mtime:
        log.warning("%s was trained on after %s was written", directory.path, file)
    count = int(figures.pop("n"))
    return {
        name: {"accuracy": value, "n": count, "error_95": binomial_error(value, count)}
        for name, value in figures.items()
    }


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        log.warning("%s is not JSON and is left out", file)
        return None


def _default_weights(directory: RunDirectory, config: TrainConfig) -> str:
    """The weights that `evaluate` measures unless told otherwise."""
    # Only a run that averages can have an SWA: no other checkpoint is read, nor torch loaded for it.
    if not config.averaging.swa_start:
        return "last"
    from arat_fast.training.checkpoint import load_checkpoint

    return "swa" if "swa" in load_checkpoint(directory.last)["recalibrated"] else "last"


def _conditions(name: str, config: TrainConfig) -> dict[str, object]:
    """What a figure of this name holds for when `evaluate` is not told otherwise; nothing for clean ones."""
    settings = config.evaluation
    ball: dict[str, object] = {"eps": format_pixels(settings.eps), "norm": settings.norm}
    if (match := PGD.fullmatch(name)) is not None:
        loss = "margin" if match[2] else "ce"
        return ball | {"alpha": format_pixels(settings.alpha), "loss": loss, "restarts": 1}
    return ball if name.startswith("autoattack") else {}


def _difference(found: Mapping[str, Any], expected: Mapping[str, object]) -> str:
    """`eps 0.01, not 0.12`; empty where nothing differs. What is not recorded is taken as expected."""
    return ", ".join(
        f"{key} {found[key]}, not {value}"
        for key, value in expected.items()
        if key in found and found[key] != value
    )


def _are_figures(figures: object) -> bool:
    return isinstance(figures, dict) and all(
        isinstance(f, dict) and is_figure(f.get("accuracy"), f.get("n")) for f in figures.values()
    )


def _record_figures(directory: RunDirectory, config: TrainConfig) -> Figures:
    """Figures of the evaluation records in the run's folder, those on more images first choice.

    Only those of the weights, ball and attack that the run's configuration names: figures of other conditions
    would stand under one title with them.
    """
    records = _present_records(directory)
    if not records:
        return {}
    weights = _default_weights(directory, config)
    figures: Figures = {}
    for file, record in records.items():
        if record.get("weights", weights) != weights:
            log.warning("%s is left out: weights %s, not %s", file, record["weights"], weights)
        else:
            _add(figures, record["figures"], file, config)
    return figures


def _present_records(directory: RunDirectory) -> dict[Path, dict[str, Any]]:
    """Evaluation records of last.pt as it is now, by file."""
    found = {}
    digest = sha256_of(directory.last) if directory.last.is_file() else None
    for file in sorted(set(directory.path.glob("*.json")) - {directory.path / "results.json"}):
        record = _read(file)
        if not (isinstance(record, dict) and "figures" in record and "checkpoint_sha256" in record):
            continue
        if not _are_figures(record["figures"]):
            log.warning("%s is a damaged record and is left out", file)
        elif record["checkpoint_sha256"] != digest:
            of = record.get("checkpoint")
            log.warning("%s is left out: measured on another checkpoint (%s) than last.pt is now", file, of)
        else:
            found[file] = record
    return found


def _add(figures: Figures, measured: Figures, file: Path, config: TrainConfig) -> None:
    """Add one record's figures of the run's own conditions; one warning names the others."""
    differences = []
    for name, figure in measured.items():
        if difference := _difference(figure, _conditions(name, config)):
            differences.append(f"{name} ({difference})")
        elif name not in figures or figure["n"] > figures[name]["n"]:
            figures[name] = figure | {"error_95": binomial_error(figure["accuracy"], figure["n"])}
    if differences:
        log.warning("%s: left out: %s", file, "; ".join(differences))


def compared_run(directory: RunDirectory) -> dict[str, Any]:
    """One run: what it trained, its figures, speed (median images/s of its epochs) and hours of training."""
    config = directory.config()
    lines = directory.metrics()
    model, dataset = directory.trained(config)
    figures = _summary_figures(directory, config)
    for name, figure in _record_figures(directory, config).items():
        if name not in figures or figure["n"] >= figures[name]["n"]:
            figures[name] = figure
    return {
        "run": str(directory.path),
        "label": description(config),
        "seed": config.seed,
        "model": model,
        "dataset": dataset,
        "eps": format_pixels(config.evaluation.eps),
        "norm": config.evaluation.norm,
        "epoch": lines[-1]["epoch"] if lines else 0,
        "epochs": config.epochs,
        "figures": figures,
        "images_per_second": median(line["images_per_second"] for line in lines) if lines else None,
        "hours": sum(line.get("wall_seconds", line["seconds"]) for line in lines) / 3600 if lines else None,
    }
