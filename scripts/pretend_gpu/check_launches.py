"""Whole iterations, compiled, captured and replayed as on an H100: what an iteration launches.

    python scripts/pretend_gpu scripts/pretend_gpu/check_launches.py RECIPE…
    --model resnet8    network in the recipe's place
    --batch 128        images
    --steps 2          of the attack
    --attack-bn auto   batch or running statistics while attacking
    --precision bf16   or fp16, fp32
    --list             print every launch of the recorded iteration, with its count

torch.compile lowers the iteration, Triton compiles every kernel for sm_90, PyTorch records and replays a CUDA
graph. Fails where a recording breaks off, where a replay is more than one launch and its inputs' copies, or
where it waits. Says nothing of numbers (`check_methods.py` does), nor of speed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import os
import sys
import warnings

import torch

from arat_fast.config import load_recipe, resolved
from arat_fast.training.build import build_fast, build_optimizer
from arat_fast.training.step import TrainStep

CUDA = ctypes.CDLL(os.environ["PRETENDED_CUDA"])
CUDA.pretended_count.restype = ctypes.c_long
CUDA.pretended_graph.restype = ctypes.c_char_p
WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
    "wait of a copy to pageable memory",
)


def count(what: str) -> int:
    """Calls since the last reset."""
    return int(CUDA.pretended_count(what.encode()))


def iterate(recipe: str, options: argparse.Namespace) -> dict[str, int]:
    """Record an iteration of both sizes and replay them; the launches of the first, by name."""
    torch._dynamo.reset()
    config = load_recipe(recipe)
    config = resolved(
        dataclasses.replace(
            config,
            model=options.model,
            attack=dataclasses.replace(config.attack, steps=options.steps, bn=options.attack_bn),
            lbgat=dataclasses.replace(config.lbgat, teacher=options.model),
        )
    )
    network, method = build_fast(config, 3, 10, None)
    network.cuda()
    method.cuda()
    parameters = [*network.parameters(), *(p for p in method.parameters() if p.requires_grad)]
    step = TrainStep(
        network,
        method,
        build_optimizer(config, parameters, fused=True),
        attack=config.attack,
        precision=options.precision,
        guard=True,
    )
    images = torch.zeros(options.batch, 32, 32, 3, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(options.batch, dtype=torch.int64, device="cuda")
    indices = torch.arange(options.batch, device="cuda")
    launches: dict[str, int] = {}
    for size in (options.batch, options.batch - 3):  # the last batch of an epoch is smaller
        batch = images[:size].clone(), labels[:size].clone(), indices[:size].clone()
        step(*batch)
        launches = launches or collections.Counter(CUDA.pretended_graph().decode().splitlines())
        CUDA.pretended_reset()
        step(*batch)
        waits = {name: count(name) for name in WAITS if count(name)}
        copies = count("launch")  # images, labels and indices into the graph's own
        if count("cudaGraphLaunch") != 1 or copies > 3 or waits:
            raise SystemExit(
                f"{recipe}, {size} images: {count('cudaGraphLaunch')} graphs, {copies} launches, {waits}"
            )
    if len(step.captured) != 2:
        raise SystemExit(f"{recipe}: {len(step.captured)} graphs recorded, not 2")
    return dict(collections.Counter(launches).most_common())


def main() -> int:
    """Check the recipes named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--attack-bn", choices=("auto", "batch", "running"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for recipe in options.recipes:
        found = iterate(recipe, options)
        inductor = sum(n for name, n in found.items() if name.startswith("triton_"))
        convolutions = found.get("cudnnBackendExecute", 0)
        print(
            f"{recipe}, {options.model}, {options.steps} attack steps: a graph of {sum(found.values())} "
            f"launches, {convolutions} of convolutions, {inductor} of Inductor's; replayed without a wait",
            flush=True,
        )
        if options.list:
            print("\n".join(f"{n:6} {name}" for name, n in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
