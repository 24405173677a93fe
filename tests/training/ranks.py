"""Run by torchrun in test_distributed.py: each rank's half of a batch against the whole in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_step import images, pair, step_of

from arat_fast.config import ARATConfig
from arat_fast.nn import synchronise_batch_norm
from arat_fast.training.distributed import join_world, leave_world
from arat_fast.training.finite import FiniteGuard

torch.set_num_threads(1)
world = join_world("cpu")
assert world.group is not None
for kind, split in (("resnet", True), ("wide", True), ("resnet", False)):
    arat = ARATConfig(split_bn=split)
    _, ours, method = pair(kind, arat, torch.float64)
    _, alone, alone_method = pair(kind, arat, torch.float64)
    if world.rank:
        with torch.no_grad():  # rank 0's weights are everybody's
            ours.get_parameter("conv1.weight").mul_(2)
    synchronise_batch_norm(ours, world.group)
    synchronise_batch_norm(method, world.group)
    step = step_of(ours, method, world=world)
    whole = step_of(alone, alone_method)
    x, labels = images(8)
    for _ in range(3):
        shared = step(x[world.rank :: world.size], labels[world.rank :: world.size])
        expected = whole(x, labels)
        for name, value in expected.items():
            mean = world.total(shared[name].double()) / world.size
            torch.testing.assert_close(mean, value.double(), rtol=1e-9, atol=1e-9, msg=f"{kind} {name}")
    for one, other in ((ours, alone), (method, alone_method)):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)

# Statistics of its own a rank: gradients are still averaged, so weights agree and statistics differ.
_, ours, method = pair("resnet", ARATConfig(), torch.float64)
step = step_of(ours, method, world=world)
step(x[world.rank :: world.size], labels[world.rank :: world.size])
for name, equal in (("conv1.weight", True), ("bn1.running_mean", False)):
    mine = ours.state_dict()[name]
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs) == (equal or world.rank == 0), name

# Rank 0's weights are everybody's, also where low-precision copies of them are what computes.
for precision in ("fp32", "bf16"):
    _, ours, method = pair("resnet", ARATConfig(), torch.float32)
    if world.rank:
        with torch.no_grad():
            ours.get_parameter("conv1.weight").mul_(2)
    step = step_of(ours, method, world=world, precision=precision)
    for _ in range(2):
        step(x[world.rank :: world.size].float(), labels[world.rank :: world.size])
    mine = ours.get_parameter("conv1.weight").detach()
    theirs = mine.contiguous()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs), precision

# A step that failed in one process is undone in all.
weight = torch.zeros(3)
guard = FiniteGuard([weight], [], world.group)
for number, term in ((4, 1.0), (5, float("nan") if world.rank else 1.0), (6, 1.0)):
    guard.before()
    weight.add_(1)
    guard.after([torch.tensor(0.5), torch.tensor(term)], number)
assert guard.failure(["one", "other"]) == (5, "other")
assert weight.tolist() == [1, 1, 1]
leave_world()
Path(sys.argv[1], f"rank{os.environ['RANK']}").touch()
