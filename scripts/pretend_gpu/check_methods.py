"""Every method trained captured and uncaptured, on a GPU that is not there: the same numbers to the last bit.

    python scripts/pretend_gpu --numbers scripts/pretend_gpu/check_methods.py [CASE…]

Three epochs of 300 handwritten digits, the last batch of each smaller, uncompiled. Replays read addresses, so
what a graph holds on to that has since moved or changed (a learning rate, a phase, an average) shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from arat_fast import cli
from arat_fast.training import trainer

METHODS = ("standard", "at", "trades", "mart", "mail-at", "mail-trades", "mail-mart", "lbgat", "arat")
# A change of phase in the middle, where a method has one.
CASES = {
    name: ["--method", name, "--mail.start-epoch", "2", "--lbgat.teacher", "resnet8"] for name in METHODS
}
CASES |= {f"emr-{name}": [*CASES[name], "--emr.coefficient", "0.02"] for name in ("at", "mail-at", "arat")}
CASES["arrest"] = ["--method", "arrest", "--arrest.teacher", "TEACHER"]  # trained beside it
CASES |= {
    "naive": ["--arat.invariance", "symmetric", "--arat.no-predictor", "--arat.no-split-bn"],
    "running statistics": ["--method", "at", "--attack.bn", "running"],
    "second forward": ["--method", "trades", "--trades.duplicate-forward"],
    "aliased start": ["--attack.aliased-start"],
    "L2": ["--attack.norm", "L2", "--attack.eps", "0.5", "--attack.alpha", "0.1"],
    "warm-up and drops": ["--attack.warmup-epochs", "2", "--drops", "2", "3"],
    "averages": ["--averaging.swa-start", "2", "--averaging.ema-decay", "0.99"],
    "validation": ["--validation", "50", "--analysis-every", "3"],
    "torchvision": ["--loader", "torchvision", "--workers", "1"],
    "fp16": ["--precision", "fp16"],
    "fp32": ["--precision", "fp32"],
}
SHORT = (
    "train --config digits --device cuda --no-compile --no-evaluate --no-with-standard --limit-train 300 "
    "--epochs 3 --attack.steps 2"
)
TIMES = ("seconds", "wall_seconds", "images_per_second")


def train(folder: Path, *arguments: str, stop_at: int | None = None) -> dict[str, Any]:
    """What a run writes, without its times; with `stop_at`, interrupted before that batch and resumed."""
    iterate, seen = trainer.Trainer._iterate, 0

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            raise KeyboardInterrupt
        return iterate(self, batch)

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        trainer.Trainer._iterate = interrupted  # type: ignore[method-assign]
        code = cli.main([*SHORT.split(), *arguments, "--run-dir", str(folder)])
        trainer.Trainer._iterate = iterate  # type: ignore[method-assign]
        if stop_at is not None:
            assert code == 130, code
            code = cli.main(["train", "--resume", "--no-evaluate", "--run-dir", str(folder)])
    if code or "without a CUDA graph" in said.getvalue():
        raise SystemExit(f"{' '.join(arguments)}: exit status {code}\n{said.getvalue()}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return {"metrics": metrics, "weights": state["method"], "averages": state["recalibrated"]}


def equal(one: Any, other: Any) -> bool:
    """Whether nested dicts and lists are the same, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    return bool(one == other)


def main() -> int:
    """Check the cases named on the command line, or all."""
    names = sys.argv[1:] or list(CASES)
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            teacher = Path(folder, "teacher")
            if "TEACHER" in CASES[name]:
                train(teacher, *CASES["standard"])
            arguments = [str(teacher) if each == "TEACHER" else each for each in CASES[name]]
            graph = train(Path(folder, "graph"), *arguments)
            found = {"uncaptured": train(Path(folder, "plain"), "--no-capture", *arguments)}
            if name == "arat":
                found["resumed"] = train(Path(folder, "resumed"), *arguments, stop_at=5)
        different = [how for how, run in found.items() if not equal(graph, run)]
        failed = failed or bool(different)
        print(f"{name}: {'DIFFERENT ' + ', '.join(different) if different else 'the same'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
