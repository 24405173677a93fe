"""`arat-fast compare`: runs side by side, from what lies in their folders; nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from arat_fast.analysis.labels import short_names
from arat_fast.commands.compare_figures import compared_run
from arat_fast.commands.compare_seeds import over_seeds, seed_cells
from arat_fast.commands.table import format_table, title
from arat_fast.errors import UserError
from arat_fast.evaluation.options import PGD
from arat_fast.training.directory import RunDirectory


@dataclass(frozen=True)
class CompareOptions:
    """Show runs side by side: accuracy with its 95 % binomial error, images/s, hours.

    Accuracies are those of the end of training (results.json) and of evaluation records (`arat-fast evaluate
    RUN --json RUN/NAME.json`) of the run's present checkpoint, default weights and own ball and attack; "-"
    where none was measured.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs."""
    over_seeds: bool = False
    """A row for the runs that differ in their seed alone: mean ± standard deviation over them."""
    json: bool = False
    """Print JSON instead of a table."""
    markdown: bool = False
    """Print a Markdown table."""


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
    return [*cells, *_cost_cells(run)]


def _cost_cells(run: dict[str, Any]) -> list[str]:
    speed, hours = run["images_per_second"], run["hours"]
    return [
        "-" if speed is None else f"{speed:,.0f}",
        # Two significant digits, so that a run of a minute is not 0.0.
        "-" if hours is None else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}",
    ]


def _note(runs: Sequence[dict[str, Any]], spread: str) -> str:
    counts = sorted({figure["n"] for run in runs for figure in run["figures"].values()})
    parts = ["accuracies in %"]
    if counts:
        parts.append(f"n = {', '.join(f'{n:,}' for n in counts)} test images, ± {spread}")
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


def _what(run: dict[str, Any]) -> str:
    what = f"{run['label']}; {run['model']}, {run['dataset']}"
    return what + (f", epoch {run['epoch']}/{run['epochs']}" if run["epoch"] < run["epochs"] else "")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(CompareOptions, args=list(arguments), prog="arat-fast compare")
    if not options.runs:
        raise UserError("no run is named: arat-fast compare RUN…")
    if options.json and options.markdown:
        raise UserError("--json and --markdown are two forms of one table; give one of them")
    directories = [RunDirectory(path) for path in options.runs]
    runs = [compared_run(directory) for directory in directories]
    columns = _columns(runs)
    titles = [*(title(name) for name in columns), "images/s", "hours"]
    if options.over_seeds:
        results = over_seeds(runs, [directory.config() for directory in directories])
        header, spread = ["what", "seeds", *titles], "the standard deviation over seeds"
        rows = [
            [_what(g), ", ".join(map(str, g["seeds"])), *seed_cells(g, columns), *_cost_cells(g)]
            for g in results
        ]
    else:
        results = runs
        header, spread = ["run", "what", *titles], "the 95 % binomial error"
        names = short_names([run["run"] for run in runs])
        rows = [[name, _what(run), *_cells(run, columns)] for name, run in zip(names, runs, strict=True)]
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    print(_markdown(header, rows) if options.markdown else format_table(header, rows))
    print(("\n" if options.markdown else "") + _note(runs, spread))
    return 0
