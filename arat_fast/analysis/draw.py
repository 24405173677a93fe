"""Which pictures an analysis has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arat_fast.analysis import pictures
from arat_fast.analysis.labels import form_label, groups, series_labels

Results = Sequence[Mapping[str, Any]]


def draw(name: str, results: Results, folder: Path) -> list[Path]:
    """Draw the named analysis of the runs; returns the files, PDF and PNG of each picture.

    Layers are compared within a network: runs of several models get a picture each, with the model in its
    name. Raises UserError where matplotlib is missing, TrainingError for a full disk.
    """
    labels = series_labels(results)
    data = {label: result[name] for label, result in zip(labels, results, strict=True)}
    if name == "margin":
        return pictures.margin_distribution(data, folder)
    if name == "epsilons":
        return pictures.accuracy_over_eps(data, folder)
    if name == "tradeoff":
        grouped = {label: [r[name] for r in runs] for label, runs in groups(results).items()}
        return pictures.tradeoff(grouped, folder)
    models = {label: result["config"]["model"] for label, result in zip(labels, results, strict=True)}
    paths = []
    for model in dict.fromkeys(models.values()):
        part = {label: value for label, value in data.items() if models[label] == model}
        suffix = f"_{model}" if len(part) < len(data) else ""
        paths += _conflict(part, folder, suffix) if name == "conflict" else _mixture(part, folder, suffix)
    return paths


def _conflict(data: Mapping[str, Any], folder: Path, suffix: str) -> list[Path]:
    if len(data) == 1:
        (conflict,) = data.values()
        lines = {form_label(conflict, form): summary for form, summary in conflict["forms"].items()}
    else:
        lines = {label: conflict["forms"]["trained"] for label, conflict in data.items()}
    paths = pictures.conflict_by_layer(lines, folder, suffix)
    collected = {label: conflict["collected"] for label, conflict in data.items() if conflict["collected"]}
    return paths + (pictures.conflict_over_training(collected, folder, suffix) if collected else [])


def _mixture(data: Mapping[str, Any], folder: Path, suffix: str) -> list[Path]:
    paths = pictures.mixture_distance(data, folder, suffix) + pictures.bn_divergence(data, folder, suffix)
    variances = {label: result["variance"] for label, result in data.items() if result["variance"]}
    return paths + (pictures.bn_variance(variances, folder, suffix) if variances else [])
