"""`arat-fast evaluate`: options and their checks, without torch; the work is in evaluate_run.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from arat_fast.config import Pixels
from arat_fast.errors import UserError
from arat_fast.evaluation.options import EvaluationOptions, check_attacks, check_options
from arat_fast.evaluation.record import check_writable


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


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(EvaluateOptions, args=list(arguments), prog="arat-fast evaluate")
    check_writable(options.json)
    shared = {f.name for f in dataclasses.fields(EvaluationOptions)} & set(vars(options))
    how = EvaluationOptions(**{name: getattr(options, name) for name in shared})
    check_options(how)
    if options.sanity:
        _check_sanity(options)
        from arat_fast.commands.evaluate_run import look_for_masking

        return look_for_masking(options)
    attacks = [name.strip() for name in options.attacks.split(",") if name.strip()]
    check_attacks(attacks)
    from arat_fast.commands.evaluate_run import measure  # torch: not for a mistake in the flags

    return measure(options, attacks, how)
