"""What `arat-fast train` does once its options are read: check, train, measure, say where everything lies."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import yaml

from arat_fast.commands.table import accuracy_table
from arat_fast.commands.train import TrainOptions
from arat_fast.config import EMRConfig, TrainConfig, resolved, to_mapping
from arat_fast.evaluation.autoattack import check_autoattack
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.record import write_json
from arat_fast.evaluation.results import evaluate_run, summary
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


def run(options: TrainOptions) -> int:
    """Train and evaluate in every process that torchrun started; returns the exit code."""
    config = resolved(options.settings)
    sources.check_dataset(config.dataset)
    check_model(config.model)
    config = checked(config)
    if options.dry_run:
        print(_dry_run(options, config))
        return 0
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
    return Path("runs") / f"{Path(config_name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


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
