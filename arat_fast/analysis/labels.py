"""How runs are called in tables and pictures, from their configurations alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arat_fast.config import TrainConfig

# Keys in which runs of one experiment may differ: what they compute on, and the seed.
_INCIDENTAL = ("seed", "data_root", "device", "threads", "loader", "workers", "engine", "compile", "capture",
               "analysis_every")  # fmt: skip


def form_of(config: TrainConfig) -> str | None:
    """Which of "naive" and "stop-gradient" the run was trained with; None for another form."""
    if config.arat.invariance == "stopgrad":
        return "stop-gradient"
    return "naive" if config.arat.invariance == "symmetric" and not config.arat.predictor else None


def description(config: TrainConfig) -> str:
    """The method and how it differs from its plain form: `arat`, `arat, naive`, `trades + EMR`."""
    parts: list[str] = [config.method]
    if config.method == "arat":
        arat = config.arat
        if form_of(config) == "naive":
            parts.append("naive")
        else:
            parts += [arat.invariance] if arat.invariance != "stopgrad" else []
            parts += ["no predictor"] if not arat.predictor and arat.invariance != "none" else []
        parts += [] if arat.split_bn else ["no split BN"]
        parts += [] if arat.auto_balance else ["no auto-balance"]
        parts += [arat.distance] if arat.distance != "cosine" else []
    return ", ".join(parts) + (" + EMR" if config.emr.coefficient else "")


def form_label(conflict: Mapping[str, Any], form: str) -> str:
    """How a form of the loss is called beside the others: `naive`, `stop-gradient, as trained`."""
    return f"{conflict['trained_form']}, as trained" if form == "trained" else form


def short_names(runs: Sequence[str]) -> list[str]:
    """Folder names of runs, with as many folders above as tell them apart."""
    paths = [Path(run).resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(runs)


def series_labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each run of a picture: what it trained where that tells all apart, else its folder."""
    labels = [str(result["label"]) for result in results]
    return labels if len(set(labels)) == len(labels) else short_names([r["run"] for r in results])


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's keys as the command line names them (`attack.eps`), without the incidental ones."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _settings(value, f"{prefix}{key}.")
        elif prefix + key not in _INCIDENTAL:
            flat[prefix + key] = value
    return flat


def groups(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs of one experiment together, by what they trained: configurations that differ in the seed alone.

    Where two experiments would have one name, what they differ in is added (`arat, epochs 9`), or the folders
    of their runs where that is more than two settings.
    """
    experiments: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        experiments.setdefault(repr(sorted(_settings(result["config"]).items())), []).append(result)
    members = list(experiments.values())
    labels = Counter(str(runs[0]["label"]) for runs in members)
    named = {}
    for runs in members:
        name = label = str(runs[0]["label"])
        if labels[label] > 1:
            namesakes = [_settings(other[0]["config"]) for other in members if other[0]["label"] == label]
            mine = _settings(runs[0]["config"])
            differ = [key for key in mine if any(other.get(key) != mine[key] for other in namesakes)]
            distinction = [f"{key} {mine[key]}" for key in differ]
            if len(differ) > 2:
                folders = dict(zip(map(id, results), short_names([r["run"] for r in results]), strict=True))
                distinction = [folders[id(run)] for run in runs]
            name = ", ".join([label, *distinction])
        named[name] = runs
    return named
