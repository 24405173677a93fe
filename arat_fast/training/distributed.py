"""Training by several processes, one a GPU: `torchrun --nproc-per-node N -m arat_fast.cli train …`.

PyTorch's DistributedDataParallel averages the gradients of the training pass; attacks run on the bare module,
without communication unless BatchNorm is synchronised. The batch size is the global one, so neither the
method nor its learning rate depends on how many processes share it. Rank 0 writes the run directory.
"""

from __future__ import annotations

import datetime
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arat_fast.errors import UserError
from arat_fast.loaders.stream import Shard

T = TypeVar("T")
# Rank 0 may validate while the others wait.
_TIMEOUT = datetime.timedelta(hours=12)
_LAST_WORK = 0.2  # seconds


@dataclass(frozen=True)
class World:
    """The processes of a run; by default just this one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # of gradients and statistics
    host_group: dist.ProcessGroup | None = None  # of flags and sums on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of every epoch."""
        return Shard(self.rank, self.size)

    def local_batch(self, batch_size: int) -> int:
        """Images a process of a global batch. Raises UserError when the processes do not divide it."""
        if batch_size % self.size or batch_size // self.size < 2:
            raise UserError(
                f"--batch-size {batch_size} does not divide among {self.size} processes, two images at least "
                f"each; give a multiple of {self.size}"
            )
        return batch_size // self.size

    def barrier(self) -> None:
        """Wait for all."""
        if self.host_group is not None:
            dist.barrier(self.host_group)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. Synchronises the hosts."""
        if self.host_group is None:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return bool(value)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes; the same tensor with one."""
        if self.host_group is None:
            return values
        summed = values.detach().to("cpu", torch.float64)
        dist.all_reduce(summed, group=self.host_group)
        return summed.to(values.device, values.dtype)

    def from_main(self, value: T) -> T:
        """What rank 0 has."""
        if self.host_group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]  # type: ignore[no-any-return]


ALONE = World()


def join_world(device_name: str) -> World:
    """The world that torchrun's environment variables describe; ALONE without them.

    Sets this process's GPU. Raises UserError when there are more processes than GPUs on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine finds only {torch.cuda.device_count()} GPUs: start as many "
                "processes as there are GPUs"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    group = dist.group.WORLD
    host = dist.new_group(backend="gloo", timeout=_TIMEOUT) if on_gpu else group
    return World(dist.get_rank(), size, group, host)


def leave_world() -> None:
    """End communication; what follows is rank 0's alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads let go of the last sums' tensors after everybody has them, and need the interpreter
        # for it: one that found it shutting down aborted the process, in one of thirty runs that ended right
        # after a sum (pytorch/pytorch#179291). So it is theirs for a moment.
        time.sleep(_LAST_WORK)


@torch.no_grad()
def start_alike(world: World, *modules: nn.Module) -> None:
    """Give every process rank 0's weights and buffers.

    DistributedDataParallel does so with the modules that it wraps, which may be copies in a low precision.
    """
    if world.group is None:
        return
    for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
        sent = tensor.contiguous()
        dist.broadcast(sent, 0, group=world.group)
        tensor.copy_(sent)


class _TrainingPass(nn.Module):
    """A training forward as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module, method: nn.Module) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, call: Callable[..., T], *inputs: Tensor | None) -> T:
        """What `call` returns, whose parameters are this module's."""
        return call(*inputs)


def averaged_over_ranks(
    network: nn.Module, method: nn.Module, world: World
) -> DistributedDataParallel | None:
    """A module called as `(forward, *inputs)`, whose backward averages gradients over the processes.

    None with one process.
    """
    if world.group is None:
        return None
    with warnings.catch_warnings():  # torch 2.13 renames the flag, torch 2.11 knows only this name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            _TrainingPass(network, method), process_group=world.group, broadcast_buffers=False
        )
