"""A leaderboard entry in RobustBench's fields (a file of its `model_info` folder), from what was measured.

Paper, authors and venue are the submitter's to fill in: null. So is every accuracy that no evaluation of
these very weights gave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arat_fast.errors import UserError
from arat_fast.export.plain import PlainNetwork
from arat_fast.pixels import format_pixels
from arat_fast.training.directory import RunDirectory

__all__ = ["model_info"]

# As the leaderboard spells them.
ARCHITECTURES = {
    "resnet8": "ResNet-8",
    "resnet18": "ResNet-18",
    "resnet18-lbgat": "ResNet-18",
    "wrn-34-10": "WideResNet-34-10",
    "resnet18-imagenet": "ResNet-18",
    "resnet50-imagenet": "ResNet-50",
}


def model_info(network: PlainNetwork) -> dict[str, Any]:
    """RobustBench's fields; accuracies are text in percent with two decimals, as there.

    `autoattack_acc` and `reported` come only from the official AutoAttack at the run's radius; the footnote
    says on how many images each figure was measured.
    """
    trained = network.run
    info: dict[str, Any] = dict.fromkeys(("link", "name", "authors"))
    # Nothing but the data set's own training images is ever used by a run; of a file nobody knows.
    info["additional_data"] = False if trained is not None else None
    info["number_forward_passes"] = 1
    info["dataset"] = trained.config.dataset if trained is not None else None
    info["venue"] = None
    info["architecture"] = ARCHITECTURES.get(network.name, network.name.rpartition("/")[2])
    info["eps"] = format_pixels(trained.config.evaluation.eps) if trained is not None else None
    figures = _figures(network)
    robust = figures.get("autoattack")
    info["clean_acc"] = _percent(figures.get("clean"))
    info["reported"] = _percent(robust)
    info["autoattack_acc"] = _percent(robust)
    names = {"clean": "clean accuracy", "autoattack": "AutoAttack"}
    parts = [f"{names[k]} on {figures[k]['n']:,} test images" for k in names if k in figures]
    info["footnote"] = f"Measured: {', '.join(parts)}." if parts else None
    return info


def _percent(figure: dict[str, Any] | None) -> str | None:
    return None if figure is None else f"{100 * figure['accuracy']:.2f}"


def _figures(network: PlainNetwork) -> dict[str, dict[str, Any]]:
    """Clean and AutoAttack figures of exactly these weights, those on more images first choice."""
    if network.run is None:
        return {}
    figures: dict[str, dict[str, Any]] = {}
    for name, figure in [*_summary(network), *_records(network)]:
        if name not in figures or figure["n"] >= figures[name]["n"]:
            figures[name] = figure
    return figures


def _of_branch(network: PlainNetwork, figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The figures that hold for the exported branch; attacks are measured on adv."""
    if network.branch == "clean":
        return [("clean", figures["clean_branch"])] if "clean_branch" in figures else []
    return [(name, figures[name]) for name in ("clean", "autoattack") if name in figures]


def _records(network: PlainNetwork) -> list[tuple[str, dict[str, Any]]]:
    """Figures of `arat-fast evaluate RUN --json RUN/NAME.json`."""
    assert network.run is not None
    settings = network.run.config.evaluation
    ball = {"eps": format_pixels(settings.eps), "norm": settings.norm}
    found = []
    for file in sorted(network.run.run.glob("*.json")):
        record = _read(file)
        if not isinstance(record, dict) or "figures" not in record:
            continue
        digest, weights = record.get("checkpoint_sha256"), record.get("weights")
        if digest != network.about["checkpoint_sha256"] or weights != network.run.weights:
            continue
        for name, figure in _of_branch(network, record["figures"]):
            if all(figure.get(key, value) == value for key, value in ball.items()):
                found.append((name, figure))
    return found


def _summary(network: PlainNetwork) -> list[tuple[str, dict[str, Any]]]:
    """Figures of results.json, the evaluation that ended the training of the weights that it prefers."""
    assert network.run is not None
    run = network.run
    preferred = "swa" if "swa" in run.checkpoint_state["recalibrated"] else "last"
    if run.weights != preferred:
        return []
    directory = RunDirectory(run.run)
    values = directory.results(run.config.method)
    file = directory.results_file(run.config.method)
    if not values or run.checkpoint.stat().st_mtime > file.stat().st_mtime:
        return []  # none, or trained on since
    figures = {k: {"accuracy": v, "n": values["n"]} for k, v in values.items() if k != "n"}
    return _of_branch(network, figures)


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file} is not JSON: repair or remove it") from None
