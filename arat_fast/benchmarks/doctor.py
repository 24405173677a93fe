"""What bounds a training run here: loader, host, attack, BatchNorm, convolutions; and what to do about it.

    arat-fast bench doctor --config digits [--data-root DATA] [--json FILE]

Runs some iterations of the given recipe on its own data: the loader alone, the iteration alone on one batch,
and a profile of the iteration. Nothing is written but the JSON.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from arat_fast.benchmarks.ceilings import measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.profiling import Profile, format_profile, profiled
from arat_fast.benchmarks.timing import seconds_of, synchronise
from arat_fast.config import load_recipe, validated
from arat_fast.errors import TrainingError, UserError
from arat_fast.evaluation.record import check_writable, write_json
from arat_fast.loaders import sources
from arat_fast.loaders.stream import Batch
from arat_fast.training.augmentation import augmented
from arat_fast.training.build import use_threads
from arat_fast.training.cost import iteration_cost
from arat_fast.training.fast_engine import FastEngine
from arat_fast.training.precision import resolve_precision
from arat_fast.training.trainer import Trainer

LOADER_SECONDS = 3.0
IDLE = 0.15  # a GPU that waits for longer is bounded by whoever feeds it
LOADER_MARGIN = 1.1  # below this multiple of the appetite the loader is in the way


@dataclass(frozen=True)
class DoctorOptions:
    """Name what bounds a training run on this machine, with figures and a remedy."""

    config: str = "digits"
    """Recipe name, or file."""
    data_root: str | None = None
    """Folder of the data set, if not the recipe's."""
    batch_size: int | None = None
    """Images a batch, if not the recipe's."""
    loader: str | None = None
    """Loader, if not the recipe's."""
    workers: int | None = None
    """Workers of the loader, if not the recipe's."""
    limit_train: int = 0
    """Use only the first N training images; 0: all."""
    repeats: int = 5
    """Timed iterations; the median counts."""
    json: Path | None = None
    """Write the findings to this file."""


@dataclass(frozen=True)
class Finding:
    """One thing that may bound: its share of the time, or how near it is to being in the way."""

    what: str
    share: float  # of an iteration's time; for the loader, appetite over supply
    figures: str
    remedy: str


REMEDIES = {
    "convolution": "this is the work itself: --precision bf16 where that is fast, larger batches",
    "BatchNorm": "--engine fast fuses it; --attack.bn running folds it away, which is another attack",
    "PGD": "on a GPU the Triton step is one launch; fewer --attack.steps is another attack",
    "optimizer": "--engine fast has a fused SGD; a larger --batch-size spreads it over more images",
    "classifier, losses": "small networks spend their time here; a larger --batch-size",
    "compiled, mixed": "compiled code of BatchNorm, losses and the rest; --no-compile names its parts",
    "augmentation": "one launch a batch on a GPU; on a CPU give the process more --threads",
    "foreach: casts, guard": "one pass over the weights each; a larger --batch-size spreads them",
    "other": "small operations: a larger --batch-size, and on a GPU --compile with --capture",
}


def findings(loader: float, appetite: float, profile: Profile, iteration_seconds: float) -> list[Finding]:
    """What bounds, the worst first.

    loader, appetite: images/s of the loader alone and of the iteration alone. The first finding is the
    loader where it is below 1.1 of the appetite, else the host where the device waits for it, else the
    largest kind of work.
    """
    kinds = [
        Finding(kind, share, f"{100 * share:.0f} % of the busy time", REMEDIES.get(kind, REMEDIES["other"]))
        for kind, share in profile.by_kind.items()
    ]
    first = []
    if loader < LOADER_MARGIN * appetite:
        first.append(
            Finding(
                "loader",
                appetite / loader,
                f"{loader:,.0f} images/s for an appetite of {appetite:,.0f}",
                "--loader resident where the data fit, else --loader ffcv with more --workers",
            )
        )
    idle = profile.idle_share
    if idle is None:  # a CPU: what the operators do not account for is Python
        idle = max(0.0, 1 - profile.busy_seconds / iteration_seconds)
    if idle > IDLE:
        launches = "" if profile.launches is None else f", {profile.launches:.0f} launches an iteration"
        first.append(
            Finding(
                "host" if profile.launches is None else "launches and host",
                idle,
                f"the device waits for {100 * idle:.0f} % of the time{launches}",
                "on a GPU --capture (one launch an iteration) and --compile; a larger --batch-size anywhere",
            )
        )
    return first + sorted(kinds, key=lambda finding: -finding.share)


def _supply(trainer: Trainer) -> float:
    """Images/s of the trainer's loader alone."""
    batches, images = trainer.stream.epoch(1), 0
    started = time.perf_counter()
    for batch in batches:
        images += len(batch.labels)
        if time.perf_counter() - started > LOADER_SECONDS:
            break
    synchronise(trainer.device)
    return images / (time.perf_counter() - started)


def _attack_share(trainer: Trainer, batch: Batch, seconds: float, repeats: int) -> float | None:
    """The attack's share of an iteration, run alone; None for the reference and for standard training."""
    engine = trainer.engine
    if not (isinstance(engine, FastEngine) and engine.method.attacks):
        return None
    step, images = engine.step, augmented(trainer.config, batch, 1)
    times = [
        seconds_of(lambda: step.attack(images, batch.labels, step.is_compiled(len(images))), trainer.device)
        for _ in range(repeats)
    ]
    return statistics.median(times) / seconds


def examine(options: DoctorOptions) -> dict[str, Any]:
    """The record: `conditions`, `figures` and `findings`, the worst first."""
    config = load_recipe(options.config)
    given = ("data_root", "batch_size", "loader", "workers", "limit_train")
    changes = {name: getattr(options, name) for name in given if getattr(options, name) not in (None, 0)}
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}; expected at least 1")
    config = validated(dataclasses.replace(config, **changes), "bench doctor")
    use_threads(config.threads)
    train, _ = sources.load(config.dataset, config.data_root, config.image_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, train, Path(folder) / "run")
        supply = _supply(trainer)
        batch = next(iter(trainer.stream.epoch(1)))

        def iterate() -> object:
            return trainer.engine.iterate(batch, 1, 0)

        for _ in range(3):
            iterate()
        seconds = statistics.median(seconds_of(iterate, trainer.device) for _ in range(options.repeats))
        attack = _attack_share(trainer, batch, seconds, options.repeats)
        try:
            profile = profiled(iterate, trainer.device)
        except RuntimeError as error:
            raise TrainingError(f"no profile, on which the findings rest: {error}") from error
        ceilings = measure_ceilings(trainer.device)
    count = len(batch.labels)
    appetite = count / seconds
    flop = iteration_cost(config, train.image_shape, train.num_classes).iteration_flop
    precision = resolve_precision(config.precision, trainer.device)
    found = findings(supply, appetite, profile, seconds)
    return {
        "benchmark": "doctor",
        "conditions": conditions(trainer.device, ceilings) | {"recipe": options.config, "batch": count},
        "figures": {
            "loader_images_per_second": supply,
            "iteration_images_per_second": appetite,
            "mfu": appetite * flop / ceilings.flop_per_second(precision),
            "attack_share": attack,
            "profile": profile.fields(),
        },
        "findings": [dataclasses.asdict(finding) for finding in found],
        "text": format_profile(profile),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(DoctorOptions, args=list(arguments), prog="arat-fast bench doctor")
    check_writable(options.json)
    record = examine(options)
    figures = record["figures"]
    print(
        f"loader alone {figures['loader_images_per_second']:,.0f} images/s; iteration alone "
        f"{figures['iteration_images_per_second']:,.0f} images/s, {100 * figures['mfu']:.0f} % of the "
        "device's matrix products"
    )
    if figures["attack_share"] is not None:
        print(f"the attack takes {100 * figures['attack_share']:.0f} % of an iteration\n")
    for place, finding in enumerate(record["findings"][:4]):
        mark = "bounds you:" if place == 0 else "then:      "
        print(f"{mark} {finding['what']}: {finding['figures']}\n            {finding['remedy']}")
    print(f"\nprofile of an iteration:\n{record.pop('text')}")
    if options.json is not None:
        write_json(options.json, record)
    return 0
