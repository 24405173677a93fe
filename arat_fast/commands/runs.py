"""`arat-fast runs`: what lies under a folder of runs, with state and figures."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from arat_fast.analysis.labels import description
from arat_fast.commands.table import format_table, title
from arat_fast.errors import UserError
from arat_fast.training.directory import LAST_GOOD, RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunsOptions:
    """List training runs with their state and figures."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder that is searched for runs, at any depth."""
    json: bool = False
    """Print JSON instead of a table."""


def describe_run(directory: RunDirectory) -> dict[str, object]:
    """One run: what it trains, how far it is, its state and its last figures.

    state: "running" (a process holds it), "damaged" (last.pt is cut short), "complete", "failed" (its last
    good weights were kept), or "stopped".
    """
    config = directory.config()
    lines = directory.metrics()
    model, dataset = directory.trained(config)
    done = lines[-1]["epoch"] if lines else 0
    if directory.is_held():
        state = "running"
    elif directory.last.exists() and not zipfile.is_zipfile(directory.last):
        state = "damaged"
    elif done >= config.epochs:
        state = "complete"
    else:
        state = "failed" if (directory.path / LAST_GOOD).exists() else "stopped"
    return {
        "run": str(directory.path),
        "method": config.method,
        "label": description(config),
        "model": model,
        "dataset": dataset,
        "state": state,
        "epoch": done,
        "epochs": config.epochs,
        "loss": lines[-1]["loss"] if lines else None,
        "results": {k: v for k, v in directory.results(config.method).items() if k != "n"},
    }


def _described_or_unreadable(path: Path) -> dict[str, object]:
    """One damaged run does not hide the others."""
    try:
        return describe_run(RunDirectory(path))
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: %s", path, " ".join(str(error).split())[:200])
        unknown = dict.fromkeys(("method", "label", "model", "dataset", "epoch", "epochs"), "?")
        return {"run": str(path), **unknown, "state": "unreadable", "loss": None, "results": {}}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(RunsOptions, args=list(arguments), prog="arat-fast runs")
    if not options.folder.is_dir():
        raise UserError(f"no folder {options.folder}; `arat-fast train` writes its runs under runs/")
    found = sorted(p.parent for p in options.folder.rglob("config.json"))
    runs = [_described_or_unreadable(path) for path in found]
    if options.json:
        print(json.dumps(runs, indent=2))
        return 0
    if not runs:
        print(f"no runs under {options.folder}")
        return 0
    rows = []
    for run in runs:
        results = run["results"]
        assert isinstance(results, dict)
        figures = ", ".join(f"{title(name)} {100 * value:.1f} %" for name, value in results.items())
        loss = "-" if run["loss"] is None else f"{run['loss']:.3f}"
        what = f"{run['label']}; {run['model']}, {run['dataset']}"
        rows.append(
            [str(run["run"]), what, str(run["state"]), f"{run['epoch']}/{run['epochs']}", loss, figures]
        )
    print(format_table(["run", "what", "state", "epoch", "loss", "test figures"], rows))
    return 0
