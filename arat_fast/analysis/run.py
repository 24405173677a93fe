"""The analyses of one run, as plain values that can be quoted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arat_fast.analysis.collect import collected
from arat_fast.analysis.gradient_conflict import (
    check_invariance,
    measure_conflict,
    reference_method,
    summarise,
)
from arat_fast.analysis.images import attack_as_trained, attacked_batches, check_fits, training_batches
from arat_fast.analysis.labels import description, form_of
from arat_fast.analysis.margin import measure_margin
from arat_fast.analysis.mixture import epoch_variance, measure_mixture
from arat_fast.analysis.tradeoff import MULTIPLES, measure_epsilons, measure_tradeoff
from arat_fast.config import TrainConfig, to_mapping
from arat_fast.errors import UserError, unknown_name
from arat_fast.evaluation.accuracy import batches
from arat_fast.evaluation.network import TrainedNetwork, load_run
from arat_fast.evaluation.record import sha256_of
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.stream import counter_seed

ANALYSES = ("conflict", "mixture", "margin", "tradeoff", "epsilons")


@dataclass(frozen=True)
class AnalysisOptions:
    """How a run is analysed. limit: first N test images, 0 for all; batches: training batches of conflict."""

    weights: str = "auto"
    limit: int = 0
    batches: int = 8
    seed: int = 0


def check_analyses(names: Sequence[str]) -> None:
    """Raise UserError with the nearest known name unless every name is an analysis."""
    for name in names:
        if name not in ANALYSES:
            raise unknown_name("analysis", name, ANALYSES)


def why_no_conflict(config: TrainConfig) -> str | None:
    """Why gradient conflict cannot be measured for a run; None where it can."""
    try:
        check_invariance(config)
    except UserError as error:
        return str(error)
    return None


def analyse_run(
    run: Path,
    train: ImageSource,
    test: ImageSet,
    what: Sequence[str],
    *,
    device: torch.device,
    options: AnalysisOptions = AnalysisOptions(),
) -> dict[str, Any]:
    """Measure the named analyses of a run; each is an entry of the result beside what identifies the run.

    Raises UserError for a directory without a run, data that does not fit it, or gradient conflict of a
    method without an invariance term.
    """
    check_analyses(what)
    trained = load_run(run, device, options.weights)
    check_fits(trained, test)
    data = test.first(options.limit)
    result: dict[str, Any] = {
        "run": str(run),
        "label": description(trained.config),
        "method": trained.config.method,
        "weights": trained.weights,
        "epochs": trained.epochs,
        "checkpoint_sha256": sha256_of(trained.checkpoint),
        "config": to_mapping(trained.config),
    }
    for name in what:
        if name == "conflict":
            result[name] = _conflict(run, train, device, options)
        elif name == "mixture":
            with _bar(len(data), name) as bar:
                attacked = attacked_batches(trained, data, seed=options.seed, device=device)
                result[name] = measure_mixture(trained.network, _counted(attacked, bar.update))
            snapshots = collected(run).snapshots
            result[name]["epochs_collected"] = len(snapshots)
            result[name]["variance"] = epoch_variance(s["branches"] for s in snapshots)
        elif name == "margin":
            parts = ((x, y) for _, x, y in batches(data, trained.config.evaluation.batch_size, device))
            result[name] = measure_margin(trained.network, parts)
        else:
            result[name] = _accuracies(name, trained, data, device, options)
    return result


def _bar(total: int, name: str) -> Any:
    return tqdm(total=total, desc=name, unit="image", leave=False, disable=None)


def _counted(source: Any, progress: Callable[[int], object]) -> Any:
    for batch in source:
        yield batch
        progress(len(batch[0]))


def _accuracies(
    name: str, trained: TrainedNetwork, data: ImageSet, device: torch.device, options: AnalysisOptions
) -> dict[str, Any]:
    passes = 2 if name == "tradeoff" else len(MULTIPLES)
    measure = measure_tradeoff if name == "tradeoff" else measure_epsilons
    with _bar(passes * len(data), name) as bar:
        return measure(trained, data, seed=options.seed, device=device, progress=bar.update)


def _conflict(
    run: Path, train: ImageSource, device: torch.device, options: AnalysisOptions
) -> dict[str, Any]:
    # Averaged weights were never trained with the predictors: the trained ones are differentiated.
    trained = load_run(run, device, "best" if options.weights == "best" else "last")
    check_fits(trained, train)
    config = trained.config
    method = reference_method(config, trained.network, trained.checkpoint_state["method"])
    own = form_of(config)
    forms = ["trained", *(form for form in ("naive", "stop-gradient") if form != own)]
    measured: dict[str, list[Any]] = {form: [] for form in forms}
    epoch = trained.epochs + 1  # its shuffle and crops were never seen
    stream = training_batches(config, train, epoch=epoch, count=options.batches, device=device)
    images_seen = 0
    for k, (images, labels) in enumerate(
        tqdm(stream, "conflict", options.batches, leave=False, unit="batch", disable=None)
    ):
        generator = torch.Generator(device).manual_seed(counter_seed(options.seed, epoch, k))
        centre, x_adv = attack_as_trained(
            method.network, images, labels, config.attack, config.method, generator
        )
        for form, conflict in measure_conflict(method, centre, x_adv, labels, forms).items():
            measured[form].append(conflict)
        images_seen += len(images)
    return {
        "weights": trained.weights,
        "trained_form": own or config.arat.invariance,
        "training_images": images_seen,
        "forms": {form: summarise(conflicts) for form, conflicts in measured.items()},
        "collected": collected(run).conflict,
    }
