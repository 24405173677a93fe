"""A training iteration as one CUDA graph: static buffers, warm-up that leaves no trace, replay.

At batch 128 an iteration launches thousands of small kernels, and the GPU waits for Python; replayed, they
are one launch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Body = Callable[..., dict[str, Tensor]]
WARM_UP = 3  # iterations on a side stream: the first compiles, the second lets lazy buffers settle


class Graph(Protocol):
    """What a capture needs of a device."""

    def side_stream(self) -> AbstractContextManager[None]:
        """Run what is inside apart from the current stream, and wait for it at the end."""
        ...

    def record(self, body: Callable[[], None]) -> None:
        """Record the launches of `body` without running them."""
        ...

    def replay(self) -> None:
        """Run what was recorded."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph` on the current device."""

    def __init__(self, beside: Graph | None = None) -> None:
        """`beside`: a graph that never runs at the same time, whose memory this one may use too."""
        self.graph = torch.cuda.CUDAGraph()
        self.pool: Any
        self.stream: torch.cuda.Stream
        if isinstance(beside, CudaGraph):
            self.pool, self.stream = beside.pool, beside.stream
        else:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """The stream of the recording: of each that it has seen cuBLAS keeps 64 MiB on Hopper."""
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # what an iteration that failed left running there, the restoring copies too
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, body: Callable[[], None]) -> None:
        """Capture into a private memory pool; what other threads do (a loader's) does not break it off.

        After a failure the process is as before: PyTorch would leave the stream, the random numbers and the
        allocator, which then frees nothing, in the capture.
        """
        collects = gc.isenabled()
        gc.disable()  # freeing a dead iteration's graph on the way would break this one off
        try:
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(
                    self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                body()
        except BaseException:
            device = torch.cuda.current_device()
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            with suppress(RuntimeError):  # where CUDA broke it off, the allocator is still in the capture
                torch._C._cuda_endAllocateToPool(device, self.pool)  # raises where it is not
                torch._C._cuda_releasePool(device, self.pool)
            raise
        finally:
            if collects:
                gc.enable()

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


def in_order(error: BaseException | None) -> str:
    """The first lines of an error and of those that it came after, the first of them first: what broke a
    capture off, then that ending it failed.
    """
    lines: list[str] = []
    while error is not None:
        lines.insert(0, (str(error) or type(error).__name__).split("\n")[0])
        error = error.__context__
    return "; then ".join(lines)


class CannotCapture(Exception):
    """Why an iteration runs uncaptured."""


class CapturedIteration:
    """`body(*inputs)` recorded once and replayed with new inputs.

    Args:
        body: an iteration; reads and writes only device tensors that outlive it.
        inputs: of the first batch; None stays None, a tensor of `constant` is used as it is, the others get
            static buffers.
        constant: inputs that are the same tensor in every call (a resident data set).
        state: gives all tensors that an iteration changes; called again after warm-up, which may add
            optimizer state. Warm-up restores those that were there and zeroes the new ones.
        graph: the device's.

    The metrics are static too: the next replay overwrites them.
    """

    def __init__(
        self,
        body: Body,
        inputs: Sequence[Tensor | None],
        constant: Sequence[bool],
        state: Callable[[], Sequence[Tensor]],
        graph: Graph,
    ) -> None:
        self.graph = graph
        self.constant = tuple(constant)
        self.inputs = [
            t if t is None or fixed else t.clone(memory_format=torch.preserve_format)
            for t, fixed in zip(inputs, constant, strict=True)
        ]
        with torch.no_grad():  # a copy that remembers its parameter would tie the capture to this stream
            before = {id(t): (t, t.clone()) for t in state()}
        random_state = torch.cuda.get_rng_state() if self._on_gpu() else None
        with graph.side_stream():
            try:
                for _ in range(WARM_UP):
                    body(*self.inputs)
            finally:
                _restore(state(), before)
        if random_state is not None:
            torch.cuda.set_rng_state(random_state)
        self.metrics: dict[str, Tensor] = {}

        def recorded() -> None:
            self.metrics = body(*self.inputs)

        graph.record(recorded)

    def _on_gpu(self) -> bool:
        return any(t is not None and t.is_cuda for t in self.inputs)

    def fits(self, inputs: Sequence[Tensor | None]) -> bool:
        """Whether a replay can take these inputs: the same shapes and dtypes, the same constants."""
        for own, given, fixed in zip(self.inputs, inputs, self.constant, strict=True):
            if own is None or given is None:
                if own is not given:
                    return False
            elif fixed:
                if own.data_ptr() != given.data_ptr() or own.shape != given.shape:
                    return False
            elif own.shape != given.shape or own.dtype != given.dtype:
                return False
        return True

    def __call__(self, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Replay with new inputs; the metrics are valid until the next call."""
        for own, given, fixed in zip(self.inputs, inputs, self.constant, strict=True):
            if own is not None and given is not None and not fixed:
                own.copy_(given)
        self.graph.replay()
        return self.metrics


@torch.no_grad()
def _restore(after: Sequence[Tensor], before: dict[int, tuple[Tensor, Tensor]]) -> None:
    for tensor in after:
        known = before.get(id(tensor))
        if known is None:
            tensor.zero_()  # optimizer state that the first step made
        else:
            tensor.copy_(known[1])


def held_by_an_older_graph(parameters: Iterable[Tensor]) -> bool:
    """Whether something computed from one of the trained parameters, with its graph, is still referenced.

    As long as it is, so is the node that sums the parameter's gradient, and that belongs to the stream on
    which it was made. Backward would make CUDA's default stream wait for the recording, which breaks it off.
    """

    def notes(parameter: Tensor) -> Any:  # which are gone with the node, where nothing else holds it
        return torch.autograd.graph.get_gradient_edge(parameter).node.metadata

    mark = "arat_fast: before the recording"
    for parameter in parameters:
        if parameter.requires_grad:
            notes(parameter)[mark] = True
            if notes(parameter).pop(mark, False):
                return True
    return False


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Turn learning rates into device tensors, which a replay reads anew.

    Raises CannotCapture, with nothing changed, for an optimizer whose step waits for the host.
    """
    for group in optimizer.param_groups:
        if not group.get("capturable", group.get("fused")):
            raise CannotCapture(
                f"{type(optimizer).__name__} reads its learning rate on the host; build it with fused=True "
                "(SGD) or capturable=True (Adam)"
            )
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if not (isinstance(group["lr"], Tensor) and group["lr"].device == device):
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        elif id(group["lr"]) in seen:  # a tensor given to all groups; each may be set by itself
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))
