"""`arat-fast train`: its options. What they ask for is done by `train_run`, which loads torch."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arat_fast.config import TrainConfig, load_recipe, recipe_names, validated, with_published_choices
from arat_fast.errors import UserError
from arat_fast.training.directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a network, adversarially or not.

    Start from a recipe (`--config NAME`), a YAML file or a run's config.json (`--config FILE`), and change
    any part of it with the flags below, whose defaults are the recipe's. Recipes: RECIPES.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: str = "arat-cifar10-resnet18"
    """Recipe name or file."""
    run_dir: Path | None = None
    """Folder of the run; default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --run-dir where it stopped; starts it when there is none yet."""
    dry_run: bool = False
    """Print the resolved configuration and what an iteration costs, then stop."""
    with_standard: bool = False
    """Train a standard network too, on the same epochs and data, and show both under attack."""
    evaluate: bool = True
    """Measure clean and PGD accuracy on the test images at the end."""
    tensorboard: bool = False
    """Write TensorBoard events into the run's folder too."""
    autoattack: bool = False
    """Run AutoAttack too at the end, on the same test images (--evaluation.limit)."""


def _parse(arguments: Sequence[str]) -> TrainOptions:
    """Two passes: which recipe, then the flags over its values."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None)
    finder.add_argument("--run-dir", "--run_dir", type=Path, default=None)
    finder.add_argument("--method", default=None)
    finder.add_argument("--resume", action="store_true")
    found, _ = finder.parse_known_args(list(arguments))
    recipe = found.config
    if recipe is None and found.resume and found.run_dir is not None:
        recorded = RunDirectory(found.run_dir).config_file
        recipe = str(recorded) if recorded.is_file() else None
    recipe = recipe or "arat-cifar10-resnet18"
    default = TrainOptions(settings=_for_method(load_recipe(recipe), found.method, recipe), config=recipe)
    description = (TrainOptions.__doc__ or "").replace("RECIPES", ", ".join(recipe_names()))
    options = tyro.cli(
        TrainOptions, args=list(arguments), default=default, prog="arat-fast train", description=description
    )
    return dataclasses.replace(options, settings=validated(options.settings, "flags"))


def _for_method(config: TrainConfig, method: str | None, recipe: str) -> TrainConfig:
    """The recipe's values for a method that is not its own: that one's published attack and margin."""
    if method is None or method == config.method:
        return config
    freed = with_published_choices(config)
    if freed != config:
        log.info("--method %s: its own attack and margin take the place of those in %s", method, recipe)
    return freed


def main(arguments: Sequence[str]) -> int:
    """Run the command, in every process that torchrun started; returns the exit code."""
    options = _parse(arguments)
    if options.resume and options.run_dir is None:
        raise UserError("--resume needs --run-dir: the folder of the run to continue")
    named = any(word.split("=")[0] == "--config" for word in arguments)
    fresh = options.run_dir is not None and not RunDirectory(options.run_dir).config_file.is_file()
    if options.resume and fresh and not named and not options.dry_run:
        raise UserError(
            f"{options.run_dir} holds no run to resume; to start one there, say which: --config NAME"
        )
    from arat_fast.commands.train_run import run  # torch and the kernels: seconds, which a typo need not wait

    return run(options)
