"""The evaluation of a run as one record that can be quoted."""

from __future__ import annotations

import datetime
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arat_fast.config import to_mapping
from arat_fast.environment import environment
from arat_fast.errors import UserError
from arat_fast.evaluation.accuracy import clean_correct, pgd_correct
from arat_fast.evaluation.autoattack import OFFICIAL_ITERATIONS, PAPER_ITERATIONS, autoattack_correct
from arat_fast.evaluation.network import TrainedNetwork, load_run
from arat_fast.evaluation.options import PGD, EvaluationOptions, check_attacks, check_options
from arat_fast.evaluation.record import binomial_error, sha256_of
from arat_fast.loaders.images import ImageSet
from arat_fast.pixels import format_pixels
from arat_fast.reference import SplitBatchNorm2d
from arat_fast.training.directory import RunDirectory

_DEFAULTS = EvaluationOptions()


def _figure(correct: Tensor, **settings: object) -> dict[str, object]:
    accuracy = int(correct.sum()) / len(correct)
    return {
        "accuracy": accuracy,
        "correct": int(correct.sum()),
        "n": len(correct),
        "error_95": binomial_error(accuracy, len(correct)),
        **settings,
    }


def _digest_of(data: ImageSet) -> str:
    """Of the bytes of a data set's images and labels."""
    digest = hashlib.sha256(data.images.tobytes())
    digest.update(data.labels.tobytes())
    return digest.hexdigest()


def evaluate_run(
    run: Path,
    test: ImageSet,
    attacks: Sequence[str],
    *,
    device: torch.device,
    options: EvaluationOptions = _DEFAULTS,
) -> dict[str, Any]:
    """Measure a run on test images with the named attacks; everything needed to quote the figures is in the
    result.

    attacks: "clean", "pgdK", "pgdK-margin", "autoattack" (official, 100 iterations), "autoattack10" (10
    iterations, as the ARAT paper's figures). Raises UserError for an unknown attack, an option out of
    range, a damaged run, or data that does not fit the network.
    """
    check_attacks(attacks)
    check_options(options)
    metrics = RunDirectory(run).metrics()  # first: a damaged file should not cost an evaluation
    trained = load_run(run, device, options.weights)
    shape = tuple(trained.checkpoint_state["image_shape"])
    if test.image_shape != shape or test.num_classes != trained.checkpoint_state["num_classes"]:
        raise UserError(
            f"{run} was trained on images of {shape} in {trained.checkpoint_state['num_classes']} classes; "
            f"{test.source} has {test.image_shape} in {test.num_classes}"
        )
    digest = sha256_of(trained.checkpoint)
    data = test.first(options.limit)
    figures: dict[str, dict[str, object]] = {}
    for name in attacks:
        if name == "clean":
            figures |= _clean_figures(trained, data, options, device)
        elif (match := PGD.fullmatch(name)) is not None:
            loss = "margin" if match[2] else "ce"
            figures[name] = _pgd_figure(trained, data, int(match[1]), loss, options, device)
        else:
            iterations = PAPER_ITERATIONS if name == "autoattack10" else OFFICIAL_ITERATIONS
            figures[name] = _autoattack_figure(trained, data, iterations, options, digest, device)
    speeds = [line["images_per_second"] for line in metrics]
    return {
        "run": str(run),
        "method": trained.config.method,
        "model": trained.config.model,
        "dataset": trained.config.dataset,
        "weights": trained.weights,
        "checkpoint": trained.checkpoint.name,
        "checkpoint_sha256": digest,
        "epochs": trained.epochs,
        "branch": "adv",
        "bn": "running statistics",
        "figures": figures,
        "images_per_second": statistics.median(speeds) if speeds else None,
        "config": to_mapping(trained.config),
        "environment": environment(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _batch_size(trained: TrainedNetwork, options: EvaluationOptions) -> int:
    return options.batch_size or trained.config.evaluation.batch_size


def _clean_figures(
    trained: TrainedNetwork, data: ImageSet, options: EvaluationOptions, device: torch.device
) -> dict[str, dict[str, object]]:
    size = _batch_size(trained, options)
    figures = {
        "clean": _figure(clean_correct(trained.network, data, batch_size=size, device=device), branch="adv")
    }
    if any(isinstance(m, SplitBatchNorm2d) for m in trained.network.modules()):
        other = clean_correct(trained.network, data, branch="clean", batch_size=size, device=device)
        figures["clean_branch"] = _figure(other, branch="clean")
    return figures


def _pgd_figure(
    trained: TrainedNetwork,
    data: ImageSet,
    steps: int,
    loss: str,
    options: EvaluationOptions,
    device: torch.device,
) -> dict[str, object]:
    settings = trained.config.evaluation
    eps = settings.eps if options.eps is None else options.eps
    alpha = settings.alpha if options.alpha is None else options.alpha
    with tqdm(total=len(data), desc=f"pgd{steps}", unit="image", leave=False, disable=None) as bar:
        correct = pgd_correct(
            trained.network,
            data,
            eps=eps,
            alpha=alpha,
            steps=steps,
            norm=settings.norm,
            loss=loss,
            restarts=options.restarts,
            seed=options.seed,
            batch_size=_batch_size(trained, options),
            device=device,
            progress=bar.update,
        )
    return _figure(
        correct,
        branch="adv",
        eps=format_pixels(eps),
        alpha=format_pixels(alpha),
        steps=steps,
        norm=settings.norm,
        loss=loss,
        restarts=options.restarts,
        seed=options.seed,
    )


def _autoattack_figure(
    trained: TrainedNetwork,
    data: ImageSet,
    iterations: int,
    options: EvaluationOptions,
    digest: str,
    device: torch.device,
) -> dict[str, object]:
    settings = trained.config.evaluation
    eps = settings.eps if options.eps is None else options.eps
    size = _batch_size(trained, options)
    # Everything the verdicts depend on is in the name, so that another evaluation never picks up these: the
    # images too, as --data-root may change them, and the batches, as each draws its own random numbers.
    key = (
        f"{digest}-{trained.weights}-{eps!r}-{settings.norm}-{iterations}-{options.seed}-{size}-"
        f"{data.images.shape}-{_digest_of(data)}"
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    correct = autoattack_correct(
        trained.network,
        data,
        eps=eps,
        norm=settings.norm,
        iterations=iterations,
        seed=options.seed,
        batch_size=size,
        device=device,
        state_file=trained.run / "autoattack" / f"{name}.json",
    )
    official = iterations == OFFICIAL_ITERATIONS
    return _figure(
        correct,
        branch="adv",
        eps=format_pixels(eps),
        norm=settings.norm,
        version="standard"
        if official
        else f"standard, {iterations} iterations (as the ARAT paper's figures)",
        iterations=iterations,
        seed=options.seed,
    )


def summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Plain figures of one evaluation: attack name -> accuracy in [0, 1], and n, the images they were
    measured on.
    """
    figures = evaluation["figures"]
    return {name: figure["accuracy"] for name, figure in figures.items()} | {
        "n": min(figure["n"] for figure in figures.values())
    }
