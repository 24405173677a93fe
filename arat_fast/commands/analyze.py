"""`arat-fast analyze`: why a run behaves as it does, as tables, JSON and pictures."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from arat_fast.analysis import figures
from arat_fast.analysis.draw import draw
from arat_fast.analysis.run import (
    ANALYSES,
    AnalysisOptions,
    analyse_run,
    check_analyses,
    why_no_conflict,
)
from arat_fast.commands.analysis_tables import table
from arat_fast.config import TrainConfig
from arat_fast.environment import environment
from arat_fast.errors import UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.loaders import sources
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.training.build import pick_device, use_threads
from arat_fast.training.directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalyzeOptions:
    """Analyse runs: gradient conflict, clean and adversarial features, effective margin, trade-off, eps.

    Prints tables, and writes JSON and pictures (PDF, PNG) for each analysis.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs."""
    what: str = "all"
    """Comma-separated: conflict (classification against invariance gradients, on training batches), mixture
    (features and BatchNorm statistics of clean and adversarial images), margin, tradeoff (clean and robust
    accuracy), epsilons (accuracy over the radius); all: what each run allows.
    """
    limit: int = 0
    """Use the first N test images; 0: all."""
    batches: int = 8
    """Training batches of gradient conflict."""
    out: Path | None = None
    """Folder of JSON files and pictures; default: RUN/analysis for one run, ./analysis for several."""
    pictures: bool = True
    """Draw pictures; needs matplotlib."""
    weights: Literal["auto", "last", "best", "swa", "ema"] = "auto"
    """Which weights; auto: the SWA where the run has one, else last. Gradient conflict uses no averages."""
    seed: int = 0
    """Seed of the attacks."""
    data_root: str | None = None
    """Folder of the data set, if not where the runs found it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: Path | None = None
    """Write everything to this one file too."""


def _chosen(what: str) -> list[str]:
    names = [name.strip() for name in what.split(",") if name.strip()]
    if names == ["all"]:
        return list(ANALYSES)
    check_analyses(names)
    if not names:
        raise UserError(f"--what names no analysis; known: {', '.join(ANALYSES)}, or all")
    return names


def _prepared(folder: Path) -> Path:
    """The output folder, made and tried before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --out") from None
    return folder


def _for_run(names: Sequence[str], config: TrainConfig, run: Path, every: bool) -> list[str]:
    reason = why_no_conflict(config) if "conflict" in names else None
    if reason is None:
        return list(names)
    if not every:
        raise UserError(f"{run}: {reason}; leave conflict out of --what")
    log.info("%s: no conflict: %s", run, reason)
    return [name for name in names if name != "conflict"]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(AnalyzeOptions, args=list(arguments), prog="arat-fast analyze")
    check_writable(options.json)
    if not options.runs:
        raise UserError("no run is named: arat-fast analyze RUN…")
    if options.limit < 0 or options.batches < 1:
        raise UserError(
            f"--limit is {options.limit} and --batches {options.batches}; expected at least 0 and 1"
        )
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; expected at least 0")
    names = _chosen(options.what)
    directories = [RunDirectory(run) for run in options.runs]
    configs = [directory.config() for directory in directories]
    for directory in directories:
        directory.check_network()
    wanted = [
        _for_run(names, config, run, options.what == "all")
        for config, run in zip(configs, options.runs, strict=True)
    ]
    if options.pictures:
        figures.need_matplotlib()
    out = _prepared(
        options.out or (options.runs[0] / "analysis" if len(options.runs) == 1 else Path("analysis"))
    )
    device = pick_device(options.device)
    how = AnalysisOptions(options.weights, options.limit, options.batches, options.seed)
    data: dict[tuple[str, str | None, int], tuple[ImageSource, ImageSet]] = {}
    results = []
    for run, config, what in zip(options.runs, configs, wanted, strict=True):
        use_threads(config.threads)
        place = (config.dataset, options.data_root or config.data_root, config.image_size)
        if place not in data:
            data[place] = sources.load(*place)
        log.info("analysing %s: %s", run, ", ".join(what))
        results.append(analyse_run(run, *data[place], what, device=device, options=how))
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "limit": options.limit,
        "batches": options.batches,
        "seed": options.seed,
        "environment": environment(device),
    }
    written = _write(results, names, about, out, options.pictures)
    if options.json is not None:
        write_json(options.json, about | {"runs": results})
        written.append(options.json)
    print(f"\nwritten: {out}" + (f", {options.json}" if options.json is not None else ""))
    log.info("files: %s", ", ".join(path.name for path in written))
    return 0


def _write(
    results: Sequence[dict[str, Any]],
    names: Sequence[str],
    about: dict[str, Any],
    out: Path,
    pictures: bool,
) -> list[Path]:
    """Print a table, and write JSON and pictures, for each analysis."""
    written = []
    identity = ("run", "label", "method", "weights", "epochs", "checkpoint_sha256", "config")
    for name in names:
        having = [result for result in results if name in result]
        if not having:
            continue
        print(table(name, having) + "\n")
        record = {"analysis": name} | about
        runs = [{key: result[key] for key in (*identity, name)} for result in having]
        write_json(out / f"{name}.json", record | {"runs": runs})
        written.append(out / f"{name}.json")
        if pictures:
            written += draw(name, having, out)
    return written
