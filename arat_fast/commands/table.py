"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"clean": "clean", "clean_branch": "clean, clean branch", "autoattack": "AutoAttack"}


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def title(figure: str) -> str:
    """A figure's column title: pgd20 -> PGD-20, autoattack10 -> AutoAttack, 10 iterations."""
    if figure == "autoattack10":
        return "AutoAttack, 10 iterations"
    if figure.startswith("pgd"):
        return "PGD-" + figure.removeprefix("pgd")
    return TITLES.get(figure, figure)


def accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a run: accuracies in percent with their 95 % binomial error, images/s, and the run's folder.

    Below it: the ball, the weights and the number of images.
    """
    names: list[str] = []
    for evaluation in evaluations.values():
        names += [name for name in evaluation["figures"] if name not in names]
    header = ["", *(title(name) for name in names), "images/s", "run"]
    rows = []
    for label, evaluation in evaluations.items():
        cells = []
        for name in names:
            figure = evaluation["figures"].get(name)
            cells.append(
                "-"
                if figure is None
                else f"{100 * figure['accuracy']:.1f} ± {100 * figure['error_95']:.1f} %"
            )
        speed = evaluation["images_per_second"]
        rows.append([label, *cells, "-" if speed is None else f"{speed:,.0f}", str(evaluation["run"])])
    return format_table(header, rows) + "\n" + _note(list(evaluations.values()))


def _note(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """What the figures hold for: ball, weights, images; the table is meant to be quoted."""
    figures = [figure for evaluation in evaluations for figure in evaluation["figures"].values()]
    balls = {f"{figure['norm']} {figure['eps']}" for figure in figures if "eps" in figure}
    weights = {str(evaluation["weights"]) for evaluation in evaluations}
    counts = {figure["n"] for figure in figures}
    parts = [*sorted(balls), f"weights {', '.join(sorted(weights))}"]
    parts.append(f"n = {', '.join(f'{n:,}' for n in sorted(counts))} test images")
    return ", ".join(parts) + "; ± is the 95 % binomial error"
