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


def groups(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs of one experiment together, by what they trained: those whose configurations differ in the seed
    alone; every run by itself where two experiments would have one name.
    """

    def essence(result: Mapping[str, Any]) -> str:
        return repr(sorted((k, v) for k, v in result["config"].items() if k not in _INCIDENTAL))

    names = Counter(label for label, _ in {(r["label"], essence(r)) for r in results})
    if any(count > 1 for count in names.values()):
        return {n: [r] for n, r in zip(short_names([r["run"] for r in results]), results, strict=True)}
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        grouped.setdefault(result["label"], []).append(result)
    return grouped
