"""Runs of one experiment that differ in their seed, as one row of `arat-fast compare`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

from arat_fast.analysis.labels import groups
from arat_fast.config import TrainConfig, to_mapping

log = logging.getLogger(__name__)


def over_seeds(runs: Sequence[dict[str, Any]], configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """One result for each experiment among `compared_run`'s: its seeds, and of every figure the mean, the
    sample standard deviation (None of a single run) and the runs' values; median images/s and mean hours.

    A warning names seeds that occur twice, and figures that not every run of an experiment has.
    """
    results = [
        # Of one's own network or data the configuration does not know the name.
        run | {"config": to_mapping(config) | {"model": run["model"], "dataset": run["dataset"]}}
        for run, config in zip(runs, configs, strict=True)
    ]
    return [_experiment(label, members) for label, members in groups(results).items()]


def _experiment(label: str, members: Sequence[Any]) -> dict[str, Any]:
    members = sorted(members, key=lambda run: run["seed"])
    first, seeds = members[0], [run["seed"] for run in members]
    if len(set(seeds)) < len(seeds):
        places = ", ".join(run["run"] for run in members)
        log.warning("%s: seeds %s are not all different; the spread is too small", places, seeds)
    figures = {}
    for name in dict.fromkeys(name for run in members for name in run["figures"]):
        found = [run["figures"][name] for run in members if name in run["figures"]]
        values = [figure["accuracy"] for figure in found]
        if len(found) < len(members):
            log.warning("%s: only %d of %d runs have %s", label, len(found), len(members), name)
        figures[name] = {
            "mean": fmean(values),
            "std": stdev(values) if len(values) > 1 else None,
            "accuracies": values,
            "n": [figure["n"] for figure in found],
        }
    speeds = [run["images_per_second"] for run in members if run["images_per_second"] is not None]
    hours = [run["hours"] for run in members if run["hours"] is not None]
    same = ("model", "dataset", "eps", "norm", "epochs")
    return {
        "label": label,
        **{key: first[key] for key in same},
        "runs": [run["run"] for run in members],
        "seeds": seeds,
        "epoch": min(run["epoch"] for run in members),
        "figures": figures,
        "images_per_second": median(speeds) if speeds else None,
        "hours": fmean(hours) if hours else None,
    }


def seed_cells(experiment: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Cells of a table: mean ± standard deviation in percent, the mean alone of a single run."""
    cells = []
    for name in columns:
        figure = experiment["figures"].get(name)
        if figure is None:
            cells.append("-")
        else:
            spread = "" if figure["std"] is None else f" ± {100 * figure['std']:.1f}"
            cells.append(f"{100 * figure['mean']:.1f}{spread}")
    return cells
