"""Loss curves of both engines on real CIFAR-10: python bench/engines_cifar.py --data-root DATA [--json FILE]

The first iterations of the paper's recipe (batch 32) by the reference and the fast engine, from the same
seeds: the same weights, batches and crops, other random starts. Windows of ten iterations are compared: the
distance of the two engines' means over seeds, against the spread (largest less smallest) over seeds of either
engine. The committed results are bench/results/engines_cifar_*.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from arat_fast.config import load_recipe
from arat_fast.environment import environment
from arat_fast.loaders import sources
from arat_fast.loaders.stream import Batch
from arat_fast.training.precision import resolve_precision
from arat_fast.training.trainer import Trainer

ENGINES = ("reference", "fast")
TERMS = ("loss", "ce_adv", "ce_clean", "invariance", "accuracy_adv")


def curve(engine: str, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    config = load_recipe("arat-cifar10-resnet18")
    config = dataclasses.replace(
        config,
        engine=engine,
        seed=seed,
        model=options.model,
        batch_size=options.batch,
        limit_train=options.batch * options.iterations,
        epochs=1,
        device="cpu",
        loader="resident",
        attack=dataclasses.replace(config.attack, steps=options.steps),
    )
    train, _ = sources.load("cifar10", str(options.data_root))
    seen: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, train, Path(folder) / "run")
        iterate = trainer.engine.iterate

        def recorded(batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
            metrics = iterate(batch, epoch, step)
            seen.append({name: value.clone() for name, value in metrics.items()})
            return metrics

        trainer.engine.iterate = recorded  # type: ignore[method-assign]
        trainer.run()
    return {name: [float(metrics[name]) for metrics in seen] for name in TERMS}


def windows(values: list[float], width: int = 10) -> list[float]:
    return [statistics.mean(values[k : k + width]) for k in range(0, len(values), width)]


def compare(curves: dict[str, list[dict[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """Per metric: the largest distance of the means over the larger spread of the seeds, and how often it is
    below 1."""
    summary = {}
    for term in TERMS:
        table = {e: list(zip(*(windows(c[term]) for c in of), strict=True)) for e, of in curves.items()}
        ratios = []
        for one, other in zip(*table.values(), strict=True):
            spread = max(max(one) - min(one), max(other) - min(other))
            ratios.append(abs(statistics.mean(one) - statistics.mean(other)) / max(spread, 1e-9))
        summary[term] = {
            "largest": max(ratios),
            "median": statistics.median(ratios),
            "share_within": statistics.mean(r <= 1 for r in ratios),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    curves: dict[str, list[dict[str, list[float]]]] = {engine: [] for engine in ENGINES}
    for seed in range(options.seeds):
        for engine in ENGINES:
            curves[engine].append(curve(engine, seed, options))
            last = {k: round(v[-1], 4) for k, v in curves[engine][-1].items()}
            print(f"seed {seed} {engine}: last iteration {last}", flush=True)
    summary = compare(curves)
    print(json.dumps(summary, indent=1))
    if options.json:
        record = {
            "what": "loss curves of the two engines: distance of the means over the seeds' spread",
            "date": datetime.date.today().isoformat(),
            "conditions": {k: str(v) for k, v in vars(options).items() if k not in ("json", "data_root")},
            "precision": resolve_precision("auto", torch.device("cpu")),  # of the fast engine
            "environment": environment(),
            "summary": summary,
            "curves": {
                e: [{k: [round(x, 5) for x in v] for k, v in c.items()} for c in of]
                for e, of in curves.items()
            },
        }
        options.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
