"""`arat-fast compare`: runs side by side, from what lies in their folders; nothing is measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from arat_fast.analysis.labels import description, short_names
from arat_fast.commands.table import format_table, title
from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.evaluation.accuracy import binomial_error
from arat_fast.evaluation.results import PGD, sha256_of
from arat_fast.pixels import format_pixels
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.directory import RunDirectory, is_figure

log = logging.getLogger(__name__)
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CompareOptions:
    """Show runs side by side: accuracy with its 95 % binomial error, images/s, hours.

    Accuracies are those of the end of training (results.json) and of evaluation records (`arat-fast evaluate
    RUN --json RUN/NAME.json`) of the run's present checkpoint, default weights and own ball and attack; "-"
    where none was measured.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs."""
    json: bool = False
    """Print JSON instead of a table."""
    markdown: bool = False
    """Print a Markdown table."""


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
    # Only a run that averages can have an SWA: no other checkpoint is read.
    if not config.averaging.swa_start:
        return "last"
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
        "model": model,
        "dataset": dataset,
        "eps": format_pixels(config.evaluation.eps),
        "norm": config.evaluation.norm,
        "epoch": lines[-1]["epoch"] if lines else 0,
        "epochs": config.epochs,
        "figures": figures,
        "images_per_second": median(line["images_per_second"] for line in lines) if lines else None,
        "hours": sum(line["seconds"] for line in lines) / 3600 if lines else None,
    }


def _columns(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Clean, every PGD, AutoAttack, and whatever else was measured but the clean branch's accuracy."""
    found = {name for run in runs for name in run["figures"]} - {"clean_branch"}
    attacks = sorted(name for name in found if PGD.fullmatch(name)) or ["pgd20"]
    rest = sorted(found - {"clean", "autoattack", *attacks})
    return ["clean", *attacks, "autoattack", *rest]


def _cells(run: dict[str, Any], columns: Sequence[str]) -> list[str]:
    cells = []
    for name in columns:
        figure = run["figures"].get(name)
        cells.append(
            "-" if figure is None else f"{100 * figure['accuracy']:.1f} ± {100 * figure['error_95']:.1f}"
        )
    speed, hours = run["images_per_second"], run["hours"]
    cells.append("-" if speed is None else f"{speed:,.0f}")
    # Two significant digits, so that a run of a minute is not 0.0.
    cells.append("-" if hours is None else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}")
    return cells


def _note(runs: Sequence[dict[str, Any]]) -> str:
    counts = sorted({figure["n"] for run in runs for figure in run["figures"].values()})
    parts = ["accuracies in %"]
    if counts:
        parts.append(f"n = {', '.join(f'{n:,}' for n in counts)} test images, ± the 95 % binomial error")
    balls = sorted({f"{run['norm']} {run['eps']}" for run in runs})
    parts.append(f"attacks within {', '.join(balls)}" + (" (not the same!)" if len(balls) > 1 else ""))
    unfinished = [run for run in runs if run["epoch"] < run["epochs"]]
    if unfinished:
        parts.append(f"{len(unfinished)} not trained to the end")
    return "; ".join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if i < 2 else "---:" for i in range(len(header))) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(CompareOptions, args=list(arguments), prog="arat-fast compare")
    if not options.runs:
        raise UserError("no run is named: arat-fast compare RUN…")
    if options.json and options.markdown:
        raise UserError("--json and --markdown are two forms of one table; give one of them")
    runs = [compared_run(RunDirectory(path)) for path in options.runs]
    if options.json:
        print(json.dumps(runs, indent=2))
        return 0
    columns = _columns(runs)
    header = ["run", "what", *(title(name) for name in columns), "images/s", "hours"]
    names = short_names([run["run"] for run in runs])
    rows = []
    for name, run in zip(names, runs, strict=True):
        what = f"{run['label']}; {run['model']}, {run['dataset']}"
        if run["epoch"] < run["epochs"]:
            what += f", epoch {run['epoch']}/{run['epochs']}"
        rows.append([name, what, *_cells(run, columns)])
    print(_markdown(header, rows) if options.markdown else format_table(header, rows))
    print(("\n" if options.markdown else "") + _note(runs))
    return 0
