"""What can be measured of a run and how: the names of figures, options, and their checks. Loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from arat_fast.errors import UserError, unknown_name

PGD = re.compile(r"pgd([1-9]\d*)(-margin)?")
NAMES = ("clean", "pgd20", "pgd20-margin", "autoattack", "autoattack10")


@dataclass(frozen=True)
class EvaluationOptions:
    """How a run is evaluated; None takes the run's own evaluation settings."""

    weights: str = "auto"
    restarts: int = 1
    seed: int = 0
    eps: float | None = None
    alpha: float | None = None
    batch_size: int | None = None
    limit: int = 0


def check_attacks(names: Sequence[str]) -> None:
    """Raise UserError with the nearest known name unless every name is an attack, or where there is none."""
    if not names:
        raise UserError(f"--attacks names no attack; known: {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES and not PGD.fullmatch(name):
            raise unknown_name("attack", name, NAMES)


def check_options(options: EvaluationOptions) -> None:
    """Raise UserError naming the flag of the first number that is out of its range."""
    ranges: dict[str, tuple[float | None, float, float]] = {
        "--restarts": (options.restarts, 1, math.inf),
        "--batch-size": (options.batch_size, 1, math.inf),
        "--limit": (options.limit, 0, math.inf),
        "--seed": (options.seed, 0, 2**31),
        "--eps": (options.eps, 0, math.inf),
        "--alpha": (options.alpha, 0, math.inf),
    }
    for flag, (value, least, end) in ranges.items():
        if value is not None and not least <= value < end:  # NaN is in no range
            raise UserError(f"{flag} is {value}; expected at least {least} and less than {end}")
