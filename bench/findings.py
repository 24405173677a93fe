"""The ARAT paper's findings in small: python bench/findings.py SETTING [--json FILE] [--seeds 3] [--runs DIR]

Settings: `digits`, that recipe at full length; `cifar10`, the paper's recipe cut down to what a CPU trains in
minutes (a small network, a part of the images, few epochs; `--data-root` names the folder of the data).
Trains every variant from the same seeds, and asks

(a) has the naive invariance loss (symmetric, no predictor) more gradient conflict than stop-gradient?
(b) does split BatchNorm separate the statistics of clean and adversarial images?
(c) is ARAT's sum of clean and robust accuracy at least that of adversarial training (AT)?

A finding counts as reproduced where every seed shows it. Runs in DIR that are complete are not trained or
measured again, so variants and seeds may be shared by several processes (`--variants`, `--from-seed`). The
committed results are bench/results/findings_*.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from arat_fast import reference
from arat_fast.analysis.collect import Collector, collected
from arat_fast.analysis.run import AnalysisOptions, analyse_run
from arat_fast.config import TrainConfig, load_recipe
from arat_fast.environment import environment
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.record import write_json
from arat_fast.evaluation.results import evaluate_run
from arat_fast.loaders import sources
from arat_fast.loaders.images import ImageSet, ImageSource
from arat_fast.loaders.stream import Batch
from arat_fast.training.build import build_method, build_network, build_optimizer
from arat_fast.training.directory import RunDirectory
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")
ACCURACIES = ("clean", "pgd20", "autoattack")
# What differs from the setting's recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "arat": {},
    "naive": {"arat": {"invariance": "symmetric", "predictor": False}},
    "stop-gradient, no predictor": {"arat": {"predictor": False}},
    "arat, no split BN": {"arat": {"split_bn": False}},
    "arat, no auto-balance": {"arat": {"auto_balance": False}},
    "at": {"method": "at"},
}
RANKED = ("arat", "arat, no auto-balance", "at")  # those that AutoAttack is run on


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the variants are trained and measured on.

    test_images: the first so many, 0 for all; attacked: how many of those AutoAttack gets; every: iterations
    between two measurements of gradient conflict.
    """

    what: str
    base: TrainConfig
    test_images: int
    attacked: int
    every: int


def setting(name: str) -> Setting:
    if name == "digits":
        return Setting("the digits recipe at full length", load_recipe("digits"), 0, 0, 10)
    base = load_recipe("arat-cifar10-resnet18")
    small = dataclasses.replace(
        base,
        model="resnet8",
        limit_train=9_984,
        epochs=8,
        learning_rate=0.1,
        first_epoch_learning_rate=0.02,
        drops=(7, 8),
        threads=1,
        compile=False,
        loader="resident",
        attack=dataclasses.replace(base.attack, steps=3, alpha=4 / 255),
        evaluation=dataclasses.replace(base.evaluation, limit=250),
    )
    what = "the paper's CIFAR-10 recipe with ResNet-8, 9,984 images, 8 epochs and PGD-3 of step 4/255"
    return Setting(what, small, 1000, 200, 40)


class Flop(TorchDispatchMode):
    """Counts operations as torch's FlopCounterMode, whose module tracker refuses autograd.grad on leaves."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def train(config: TrainConfig, images: ImageSource, folder: Path) -> float:
    """Train a run with gradient conflict measured on the way; median seconds of an iteration without that."""
    trainer = Trainer(config, images, folder)
    iterate, seconds = trainer.engine.iterate, []

    def timed(batch: Batch, epoch: int, step: int) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        metrics = iterate(batch, epoch, step)
        seconds.append(time.perf_counter() - started)
        return metrics

    trainer.engine.iterate = timed  # type: ignore[method-assign]
    trainer.run()
    return statistics.median(seconds)


def configuration(of: Setting, variant: str, seed: int) -> TrainConfig:
    changes = dict(VARIANTS[variant])
    if "arat" in changes:
        changes["arat"] = dataclasses.replace(of.base.arat, **changes["arat"])
    return dataclasses.replace(of.base, seed=seed, device="cpu", analysis_every=of.every, **changes)


def measure(
    of: Setting, variant: str, seed: int, folder: Path, data: tuple[ImageSource, ImageSet]
) -> dict[str, Any]:
    """Train, unless the folder holds the finished run, and analyse."""
    config = configuration(of, variant, seed)
    torch.set_num_threads(config.threads)
    cost = folder.with_name(folder.name + "-cost.json")
    if len(RunDirectory(folder).metrics()) < config.epochs:
        cost.write_text(json.dumps({"iteration_seconds": train(config, data[0], folder)}))
    what = ["mixture", "tradeoff"] + (["conflict"] if config.method == "arat" else [])
    result = analyse_run(folder, *data, what, device=CPU, options=AnalysisOptions())
    figures = evaluate_run(folder, data[1], ["clean", "pgd20"], device=CPU)["figures"]
    if variant in RANKED:
        options = EvaluationOptions(limit=of.attacked)
        figures |= evaluate_run(folder, data[1], ["autoattack"], device=CPU, options=options)["figures"]
    layers = result["mixture"]["layers"].values()
    variances = {b: statistics.mean(v.values()) for b, v in result["mixture"]["variance"].items()}
    row: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "revision": json.loads((folder / "environment.json").read_text())["revision"],
        **{name: 100 * figures[name]["accuracy"] for name in ACCURACIES if name in figures},
        "test_images": {name: figures[name]["n"] for name in ACCURACIES if name in figures},
        "relative_feature_distance": statistics.mean(v["relative"] for v in layers),
        "bn_divergence": {
            kind: statistics.mean(v["divergence"][kind]["mean"] for v in layers)
            for kind in ("running", "measured", "through_adv")
            if next(iter(layers))["divergence"][kind] is not None
        },
        "running_mean_variance": variances,
    }
    if config.method == "arat":
        lines = collected(folder).conflict
        row["conflict"] = {
            "over_training": {
                "share": 100 * statistics.mean(line["overall"]["share"] for line in lines),
                "cosine": statistics.mean(line["overall"]["cosine"] for line in lines),
                "measurements": len(lines),
            },
            "at_the_end": {
                form: {"share": 100 * s["overall"]["share"], "cosine": s["overall"]["cosine"]}
                for form, s in result["conflict"]["forms"].items()
            },
        }
        seconds = statistics.median(line["seconds"] for line in lines)
        row["collection_in_iterations"] = seconds / json.loads(cost.read_text())["iteration_seconds"]
    return row


def flop_of_a_collection(of: Setting, data: ImageSource) -> dict[str, float]:
    """Operations of one measurement of gradient conflict and of one training iteration, counted on the plain
    network.
    """
    config = configuration(of, "arat", 0)
    height, width, channels = data.image_shape
    images = torch.rand(config.batch_size, channels, height, width)
    labels = torch.zeros(config.batch_size, dtype=torch.int64)
    method = build_method(config, build_network(config, channels, data.num_classes))
    assert isinstance(method, reference.ARAT)
    optimizer = build_optimizer(config, list(method.parameters()))
    attack = config.attack
    with Flop() as iteration:
        reference.train_step(
            method, optimizer, images, labels, eps=attack.eps, alpha=attack.alpha, steps=attack.steps
        )
    folder = Path("/dev")  # the line goes to /dev/null
    made = Collector(1, folder, config=config, channels=channels, num_classes=data.num_classes, device=CPU)
    made.file = folder / "null"
    with Flop() as collection:
        made.after_step(1, 1, state=method.state_dict, batch=lambda: (images, labels))
    return {
        "collection": collection.total,
        "iteration": iteration.total,
        "iterations": collection.total / iteration.total,
    }


def spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "seeds": values}


def finding(
    rows: list[dict[str, Any]], claim: str, more: str, less: str, value: Callable[[dict[str, Any]], float]
) -> dict[str, Any] | None:
    """Is `value` of the variant `more` above that of `less`, seed by seed?"""
    of = {v: {r["seed"]: r for r in rows if r["variant"] == v} for v in (more, less)}
    seeds = sorted(set(of[more]) & set(of[less]))
    if not seeds:
        return None
    by_variant = {v: {s: value(of[v][s]) for s in seeds} for v in of}
    differences = [by_variant[more][s] - by_variant[less][s] for s in seeds]
    return {
        "claim": claim,
        more: spread([by_variant[more][s] for s in seeds]),
        less: spread([by_variant[less][s] for s in seeds]),
        "difference": spread(differences),
        "reproduced": all(d >= 0 for d in differences),
    }


def findings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def training(key: str) -> Callable[[dict[str, Any]], float]:
        return lambda row: float(row["conflict"]["over_training"][key])

    def end(row: dict[str, Any]) -> float:
        return float(row["conflict"]["at_the_end"]["trained"]["share"])

    def divergence(row: dict[str, Any]) -> float:
        return float(row["bn_divergence"]["measured"])

    def total(attack: str) -> Callable[[dict[str, Any]], float]:
        return lambda row: float(row["clean"] + row[attack])

    share = "(a) conflicting coordinates in %"
    plain = "stop-gradient, no predictor"
    kl = "(b) symmetric KL in nats of clean and adversarial statistics as measured"
    asked = [
        finding(rows, f"{share} over training: naive above ARAT", "naive", "arat", training("share")),
        finding(rows, f"{share} at the end: naive above ARAT", "naive", "arat", end),
        finding(rows, f"{share} over training: naive above {plain}", "naive", plain, training("share")),
        finding(rows, "(a) cosine over training: ARAT above naive", "arat", "naive", training("cosine")),
        finding(rows, f"{kl}: with split BN above without", "arat", "arat, no split BN", divergence),
        finding(rows, "(c) clean + PGD-20 in %: ARAT at least AT", "arat", "at", total("pgd20")),
        finding(rows, "(c) clean + AutoAttack in %: ARAT at least AT", "arat", "at", total("autoattack")),
        finding(
            rows,
            "(c) clean + AutoAttack in %: ARAT without auto-balance at least AT",
            "arat, no auto-balance",
            "at",
            total("autoattack"),
        ),
    ]
    return [answer for answer in asked if answer is not None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=("digits", "cifar10"))
    parser.add_argument("--data-root", help="folder of CIFAR-10")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--from-seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="build/findings_SETTING")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    of = setting(options.setting)
    runs = options.runs or Path(f"build/findings_{options.setting}")
    runs.mkdir(parents=True, exist_ok=True)
    train_set, test = sources.load(options.setting, options.data_root)
    data = train_set, test.first(of.test_images)
    rows = []
    for seed in range(options.from_seed, options.seeds):
        for variant in options.variants:
            name = f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}".lower()
            row = runs / f"{name}-row.json"
            if not row.exists():
                write_json(row, measure(of, variant, seed, runs / name, data))
            rows.append(json.loads(row.read_text()))
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "what": f"the ARAT paper's findings on {of.what}",
        "date": datetime.date.today().isoformat(),
        "conditions": environment(CPU) | {"seeds": options.seeds, "conflict_every": of.every},
        "findings": findings(rows),
        "flop": flop_of_a_collection(of, train_set),
        "rows": rows,
    }
    for answer in record["findings"]:  # type: ignore[attr-defined]
        gap = answer["difference"]
        print(f"{'reproduced    ' if answer['reproduced'] else 'NOT reproduced'}  {answer['claim']}: "
              f"{gap['mean']:+.3g} (seeds {', '.join(f'{v:+.3g}' for v in gap['seeds'])})")  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
