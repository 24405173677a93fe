"""`arat-fast bench`: measure parts of the project, each in one run and against its baselines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from arat_fast.errors import unknown_name

# name -> (module with main(arguments), what it measures)
BENCHMARKS = {
    "kernels": ("arat_fast.benchmarks.kernels", "Triton kernels on a GPU, or --compile-only without one"),
    "attack": ("arat_fast.benchmarks.attack", "PGD attacks against eager PyTorch and torchattacks"),
    "step": ("arat_fast.benchmarks.step", "a whole ARAT iteration against the eager reference"),
    "loaders": ("arat_fast.benchmarks.loaders", "images/s of each loader alone"),
    "ceilings": ("arat_fast.benchmarks.ceilings", "what the device can do at most: products and copies"),
    "convolutions": ("arat_fast.benchmarks.convolutions", "a network's convolutions alone: what they allow"),
    "rest": (
        "arat_fast.benchmarks.rest",
        "an iteration without its convolutions, against the eager reference",
    ),
    "all": ("arat_fast.benchmarks.everything", "all of them, small: a summary, one JSON, pictures"),
    "doctor": ("arat_fast.benchmarks.doctor", "what bounds a training run here, and what to do about it"),
    "plots": ("arat_fast.benchmarks.plots", "pictures of the JSON that the others wrote"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the named benchmark with the remaining arguments; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:13}{what}" for name, (_, what) in BENCHMARKS.items())
        print(f"usage: arat-fast bench NAME [OPTIONS]\n\nbenchmarks:\n{lines}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    code: int = importlib.import_module(BENCHMARKS[name][0]).main(rest)
    return code
