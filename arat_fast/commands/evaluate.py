"""`arat-fast evaluate`: the accuracy of a run, as it can be quoted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from arat_fast.analysis.labels import description
from arat_fast.commands.table import accuracy_table
from arat_fast.config import Pixels
from arat_fast.errors import UserError
from arat_fast.evaluation.network import load_run
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.evaluation.results import EvaluationOptions, check_attacks, check_options, evaluate_run
from arat_fast.evaluation.sanity import sanity_checks
from arat_fast.loaders import sources
from arat_fast.training.build import pick_device, use_threads
from arat_fast.training.directory import RunDirectory

log = logging.getLogger(__name__)
SANITY_IMAGES = 200  # of `--sanity` without --limit


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's accuracy on the test images.

    Always the inference branch (adv) with running statistics, in fp32; the clean branch's clean accuracy is
    shown beside it.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    attacks: str = "clean,pgd20"
    """Comma-separated: clean, pgdK, pgdK-margin, autoattack (official, 100 iterations), autoattack10 (as the
    paper).
    """
    weights: Literal["auto", "last", "best", "swa", "ema"] = "auto"
    """Which weights; auto: the SWA where the run has one, else last."""
    sanity: bool = False
    """Look for signs of gradient masking instead: four checks, each a pass or a warning with its figures."""
    limit: int = 0
    """Use the first N test images; 0: all."""
    restarts: int = 1
    """Random restarts of PGD; an image counts as robust when it survives all."""
    eps: Pixels | None = None
    """Radius of the ball, if not the run's."""
    alpha: Pixels | None = None
    """Step size of PGD, if not the run's."""
    seed: int = 0
    """Seed of the attacks."""
    batch_size: int | None = None
    """Images a batch, if not the run's."""
    data_root: str | None = None
    """Folder of the data set, if not where the run found it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to evaluate."""
    json: Path | None = None
    """Write the full record to this file."""


def _check_sanity(options: EvaluateOptions) -> None:
    """Raise UserError for a flag that the four checks, which set their own attacks, would not heed."""
    for name in ("attacks", "restarts", "seed", "batch_size"):
        if getattr(options, name) != getattr(EvaluateOptions, name):
            raise UserError(f"--sanity sets its own attacks; leave --{name.replace('_', '-')} out")


def _sanity(options: EvaluateOptions) -> int:
    device = pick_device(options.device)
    trained = load_run(options.run, device, options.weights)
    _, test = sources.load(
        trained.config.dataset, options.data_root or trained.config.data_root, trained.config.image_size
    )
    use_threads(trained.config.threads)
    settings = trained.config.evaluation
    checks = sanity_checks(
        trained.network,
        test.first(options.limit or SANITY_IMAGES),
        eps=settings.eps if options.eps is None else options.eps,
        alpha=settings.alpha if options.alpha is None else options.alpha,
        norm=settings.norm,
        device=device,
        progress=lambda name: log.info("checking: %s", name),
    )
    for check in checks:
        print(f"{'pass   ' if check.passed else 'WARNING'}  {check.name}: {check.figures}")
    if not all(check.passed for check in checks):
        print("A warning: the attack may be failing rather than the network resisting; see its figures.")
    if options.json is not None:
        write_json(options.json, [check.as_json() for check in checks])
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(EvaluateOptions, args=list(arguments), prog="arat-fast evaluate")
    check_writable(options.json)
    shared = {f.name for f in dataclasses.fields(EvaluationOptions)} & set(vars(options))
    how = EvaluationOptions(**{name: getattr(options, name) for name in shared})
    check_options(how)
    if options.sanity:
        _check_sanity(options)
        return _sanity(options)
    attacks = [name.strip() for name in options.attacks.split(",") if name.strip()]
    check_attacks(attacks)
    directory = RunDirectory(options.run)
    config = directory.config()
    directory.check_network()  # before any data is looked for
    use_threads(config.threads)
    _, test = sources.load(config.dataset, options.data_root or config.data_root, config.image_size)
    record = evaluate_run(options.run, test, attacks, device=pick_device(options.device), options=how)
    print(accuracy_table({description(config): record}))
    if options.json is not None:
        write_json(options.json, record)
        print(f"record: {options.json}")
    return 0
