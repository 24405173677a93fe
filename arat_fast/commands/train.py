"""`arat-fast train`: train a network, measure it, and say where everything lies."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from arat_fast.commands.table import accuracy_table
from arat_fast.config import (
    EMRConfig,
    TrainConfig,
    load_recipe,
    recipe_names,
    resolved,
    to_mapping,
    validated,
    with_published_choices,
)
from arat_fast.errors import UserError
from arat_fast.evaluation.autoattack import check_autoattack
from arat_fast.evaluation.record import write_json
from arat_fast.evaluation.results import EvaluationOptions, evaluate_run, summary
from arat_fast.loaders import sources
from arat_fast.loaders.images import ImageSource
from arat_fast.models.plain import check_model
from arat_fast.training.build import pick_device, use_threads
from arat_fast.training.checks import check_counts, checked
from arat_fast.training.cost import iteration_cost
from arat_fast.training.directory import RunDirectory
from arat_fast.training.distributed import World, join_world, leave_world
from arat_fast.training.teacher import load_teacher
from arat_fast.training.trainer import Trainer

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


def _describe_cost(config: TrainConfig) -> str:
    shape, classes, _ = sources.SHAPES[config.dataset]
    cost = iteration_cost(config, shape, classes)
    lines = [
        f"parameters              {cost.parameters:,} (+ {cost.predictor_parameters:,} of predictors)",
        f"forward                 {cost.forward_flop / 1e9:.3f} GFLOP an image",
        f"forwards an iteration   {cost.forwards}",
        f"backwards an iteration  {cost.input_backwards} input gradients, {cost.full_backwards} full",
    ]
    if cost.double_backwards:
        lines[-1] += f", {cost.double_backwards} double"
    if cost.teacher_parameters:
        trained = "trained along" if cost.teacher_backwards else "frozen"
        flop = cost.teacher_forward_flop / 1e9
        lines.append(
            f"teacher                 {cost.teacher_parameters:,} parameters, {flop:.3f} GFLOP, {trained}"
        )
    lines.append(f"iteration               {cost.iteration_flop / 1e9:.2f} GFLOP an image")
    return "\n".join(lines)


def _default_run_dir(config_name: str) -> Path:
    name = Path(config_name).stem
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return base


def _check_names(config: TrainConfig) -> None:
    sources.check_dataset(config.dataset)
    check_model(config.model)


def _dry_run(options: TrainOptions, config: TrainConfig) -> str:
    """The configuration and its cost. Raises UserError for what the run would refuse, as far as is known
    without the data.
    """
    shape, classes, images = sources.SHAPES[config.dataset]
    if config.dataset != "folder":  # whose classes and images only its files tell
        check_counts(config, images)
        if not options.resume:
            load_teacher(config, shape[2], classes)
        if options.autoattack and options.evaluate:
            check_autoattack(classes)
    cost = _describe_cost(config)
    return yaml.safe_dump(to_mapping(config), sort_keys=False) + "\n" + cost


def _train_one(
    config: TrainConfig, run_dir: Path, train: ImageSource, options: TrainOptions, world: World
) -> bool:
    """Train, and say whether there was anything left to train."""
    trainer = Trainer(
        config, train, run_dir, resume=options.resume, tensorboard=options.tensorboard, world=world
    )
    log.info(
        "training %s with %s on %d images of %s, %s", config.model, config.method, len(trainer.train_images),
        config.dataset, trainer.device,
    )  # fmt: skip
    place = trainer.epoch, trainer.batch
    trainer.run()
    return (trainer.epoch, trainer.batch) != place


def _evaluates_as_before(run_dir: Path, config: TrainConfig) -> bool:
    """Whether a run that goes on is evaluated in the ball that its figures so far are of."""
    directory = RunDirectory(run_dir)
    if not directory.config_file.is_file():
        return True
    before, now = directory.config().evaluation, config.evaluation
    return (before.norm, before.eps, before.alpha) == (now.norm, now.eps, now.alpha)


def _merged_results(
    file: Path, measured: dict[str, dict[str, Any]], trained: set[str]
) -> dict[str, dict[str, Any]]:
    """The figures measured now, and earlier ones of networks that were not trained since."""
    try:
        earlier = json.loads(file.read_text())
    except (OSError, ValueError):
        return measured
    merged = dict(measured)
    for name, figures in (earlier if isinstance(earlier, dict) else {}).items():
        if name in trained or not isinstance(figures, dict):
            continue
        now = measured.get(name, {})
        merged[name] = figures | now
        if now and not figures.keys() <= now.keys():  # n is the least of all figures'
            merged[name]["n"] = min(figures.get("n", now["n"]), now["n"])
    return merged


def main(arguments: Sequence[str]) -> int:
    """Run the command, in every process that torchrun started; returns the exit code."""
    options = _parse(arguments)
    config = resolved(options.settings)
    _check_names(config)
    config = checked(config)
    if options.resume and options.run_dir is None:
        raise UserError("--resume needs --run-dir: the folder of the run to continue")
    if options.dry_run:
        print(_dry_run(options, config))
        return 0
    named = any(word.split("=")[0] == "--config" for word in arguments)
    fresh = options.run_dir is not None and not RunDirectory(options.run_dir).config_file.is_file()
    if options.resume and fresh and not named:
        raise UserError(
            f"{options.run_dir} holds no run to resume; to start one there, say which: --config NAME"
        )
    world = join_world(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        return _train(options, config, world)
    finally:
        leave_world()


def _train(options: TrainOptions, config: TrainConfig, world: World) -> int:
    use_threads(config.threads)
    run_dir = world.from_main(options.run_dir or _default_run_dir(options.config))
    train, test = sources.load(config.dataset, config.data_root, config.image_size)
    runs: dict[str, tuple[TrainConfig, Path]] = {config.method: (config, run_dir)}
    if options.with_standard and config.method != "standard":
        runs["standard"] = (
            dataclasses.replace(config, method="standard", emr=EMRConfig()),
            run_dir / "standard",
        )
    if options.autoattack and options.evaluate:
        check_autoattack(test.num_classes)
    same_ball = _evaluates_as_before(run_dir, config)
    trained = {name for name, (one, where) in runs.items() if _train_one(one, where, train, options, world)}
    if not world.is_main:
        return 0
    leave_world()  # the evaluation is rank 0's alone, and may take hours
    if not options.evaluate:
        print(f"run: {run_dir}")
        return 0
    device = pick_device(config.device)
    attacks = ["clean", f"pgd{config.evaluation.steps}"] + (["autoattack"] if options.autoattack else [])
    # A trial on few images ends with a trial of an evaluation: PGD-20 on all of CIFAR-10 takes a CPU an hour.
    evaluation = EvaluationOptions(limit=config.evaluation.limit or config.limit_train)
    records = {
        name: evaluate_run(where, test, attacks, device=device, options=evaluation)
        for name, (_, where) in runs.items()
    }
    results = {name: summary(record) for name, record in records.items()}
    file = run_dir / "results.json"
    write_json(file, _merged_results(file, results, trained) if same_ball else results)
    print(accuracy_table(records))
    print(f"\nrun: {run_dir}")
    return 0
