"""Does the fast engine train the same network? python bench/engines_digits.py [--json FILE] [--seeds 5]

Trains the `digits` recipe with the reference and the fast engine from the same seeds, attacks both with the
official AutoAttack on all test images, and gives the difference of the mean accuracies with its 95 % interval
(Welch's t). The committed result is bench/results/engines_digits.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch

from arat_fast.config import load_recipe
from arat_fast.environment import environment
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.results import evaluate_run
from arat_fast.loaders import sources
from arat_fast.training.trainer import Trainer

ENGINES = ("reference", "fast")
# Two-sided 97.5 % points of Student's t by degrees of freedom.
T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def measure(engine: str, seed: int, limit: int) -> dict[str, object]:
    config = dataclasses.replace(load_recipe("digits"), engine=engine, seed=seed, device="cpu")  # type: ignore[arg-type]
    torch.set_num_threads(config.threads)
    train, test = sources.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, train, Path(folder) / "run")
        trainer.run()
        record = evaluate_run(
            Path(folder) / "run",
            test,
            ["clean", "autoattack"],
            device=torch.device("cpu"),
            options=EvaluationOptions(limit=limit),
        )
        speed = statistics.median(line["images_per_second"] for line in trainer.directory.metrics())
    accuracy = {name: 100 * record["figures"][name]["accuracy"] for name in ("clean", "autoattack")}
    return {"engine": engine, "seed": seed, "images_per_second": speed, **accuracy}


def difference(one: list[float], other: list[float]) -> dict[str, float]:
    """Mean of `other` less that of `one`, with Welch's 95 % interval, in points."""
    parts = [statistics.variance(values) / len(values) for values in (one, other)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / max(
        sum(p**2 / (len(v) - 1) for p, v in zip(parts, (one, other), strict=True)), 1e-12
    )
    half = T[max(1, min(10, int(freedom)))] * error
    mean = statistics.mean(other) - statistics.mean(one)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=355, help="test images")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for engine in ENGINES:
            rows.append(measure(engine, seed, options.limit))
            print(rows[-1], flush=True)
    of = {
        (engine, name): [float(str(row[name])) for row in rows if row["engine"] == engine]
        for engine in ENGINES
        for name in ("clean", "autoattack")
    }
    summary = {name: difference(of["reference", name], of["fast", name]) for name in ("clean", "autoattack")}
    print(json.dumps(summary, indent=1))
    if options.json:
        record = {
            "what": "digits recipe trained by either engine: accuracy in percent, fast less reference",
            "date": datetime.date.today().isoformat(),
            "test_images": options.limit,
            "environment": environment(),
            "summary": summary,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
