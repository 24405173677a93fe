"""FFCV 1.0.2 with its faults fenced in: the one module that imports it, when a stream of it is opened.

What is used of FFCV: its Loader, pipeline graph, memory-mapped file, prefetching thread with its ring of
buffers and CUDA streams, and its C library (libjpeg-turbo, OpenCV's resize). What is kept away, with the
reason:

- Its import and its threads set torch's number of threads (to 1). Numba's and torch's are left alone here.
- Its import compiles a Numba dictionary for 6 s; the two constants in it lie in a plain one.
- Its compiled readers and decoders mutate an interned Numba type (an error at exit) and take 5 to 12 s in
  every process. `ffcv_decode` has its own, cached, run by threads of our own: no Numba threading layer, of
  which `workqueue` aborts the process when two loaders meet.
- Its thread ends silently when an operation raises, and the reader waits for ever; it outlives a reader
  that stops early; its end cannot be posted to a full queue. `Prefetcher` carries errors across, always
  ends, and is joined, at the latest when the interpreter exits.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arat_fast.errors import UserError
from arat_fast.loaders.beton import BetonFile

PINNED = "1.0.2"
AHEAD = 3  # batches made in advance
Decode = Callable[[NDArray[np.int64], Any], Any]  # (rows, buffer of a batch) -> the part that was filled


class Runtime(NamedTuple):
    """FFCV's guarded classes, and its C library (a ctypes.CDLL)."""

    loader: Any
    prefetcher: Any
    decoder: Any
    pipeline: Callable[[Any, torch.device], list[Any]]
    library: Any


def why_not() -> str | None:
    """Why FFCV cannot be used here, or None. Imports nothing."""
    try:
        version = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        return "FFCV is not installed (scripts/ffcv.sh installs it)"
    if version != PINNED:
        return f"FFCV {version} is installed; only {PINNED} is known to work (scripts/ffcv.sh installs it)"
    return None


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@cache
def runtime() -> Runtime:
    """Import FFCV, once. Raises UserError where it is missing, another version, or cannot be loaded."""
    reason = why_not()
    if reason is not None:
        raise UserError(f"--loader ffcv: {reason}, or use --loader resident or torchvision")
    threads = torch.get_num_threads()
    try:
        import numba
        import numba.typed

        with (
            _replaced(numba, "set_num_threads", lambda number: None),
            _replaced(numba.typed, "Dict", dict),
        ):
            import ffcv.loader
            import ffcv.loader.epoch_iterator
            import ffcv.loader.loader
            from ffcv.pipeline.compiler import Compiler
    except (ImportError, OSError) as error:
        raise UserError(
            f"--loader ffcv: FFCV is installed but cannot be loaded ({error}); run scripts/ffcv.sh again, or "
            "use --loader resident or torchvision"
        ) from None
    finally:
        torch.set_num_threads(threads)
    # The number is all that is wanted of it: torch's threads are not FFCV's to set, Numba's are not used.
    Compiler.set_num_threads = classmethod(lambda cls, number: setattr(cls, "num_threads", max(1, number)))
    return _guarded(ffcv, Compiler)


def _guarded(ffcv: Any, compiler: Any) -> Runtime:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import lib
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import ToDevice, ToTensor

    base = ffcv.loader.epoch_iterator.EpochIterator

    class MappedFile(OSCacheManager):  # type: ignore[misc]
        """FFCV's memory map, less the compiled reader and the Python dictionaries of every image's pages."""

        def __init__(self, reader: Any) -> None:
            self.reader = reader
            self.ptrs = self.sizes = np.empty(0, np.uint64)
            self.context = ffcv.memory_managers.os_cache.OSCacheContext(self)

        def compile_reader(self) -> None:
            """None: `ffcv_decode` reads."""

    class Decoder(SimpleRGBImageDecoder):  # type: ignore[misc]
        """Calls `decode`; a subclass of FFCV's, which puts its own in front of any other operation."""

        def __init__(self, decode: Decode, shape: tuple[int, int, int]) -> None:
            super().__init__()
            self.decode, self.shape = decode, shape

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            """A batch of `shape`."""
            state = type(previous_state)(
                jit_mode=True, device=previous_state.device, shape=self.shape, dtype=np.dtype("u1")
            )
            return state, AllocationQuery(self.shape, np.dtype("u1"))

        def generate_code(self) -> Any:
            """The function that FFCV's thread calls."""

            def code(rows: Any, memory: Any, metadata: Any, storage: Any) -> Any:
                return self.decode(np.ascontiguousarray(rows, np.int64), memory)

            return code

    class Loader(ffcv.loader.Loader):  # type: ignore[misc]
        """FFCV's loader over a checked file, whose order is given with each epoch."""

        def __init__(
            self, file: BetonFile, batch_size: int, workers: int, operations: list[Operation]
        ) -> None:
            image, label = file.field_names
            # Nothing here is for Numba: FFCV's switch for that makes plain Python of the generated stages.
            with (
                _replaced(ffcv.loader.loader, "OSCacheManager", MappedFile),
                _replaced(compiler, "is_enabled", False),
            ):
                super().__init__(
                    str(file.path), batch_size, num_workers=max(1, workers), os_cache=True, seed=0,
                    pipelines={image: operations, label: None}, drop_last=False, batches_ahead=AHEAD,
                )  # fmt: skip

        def batches(self, rows: NDArray[np.int64]) -> Any:
            """Start prefetching the images `rows`, in this order."""
            # FFCV does not check: an index outside the file would be read as one.
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.reader.metadata):
                raise IndexError(
                    f"rows reach from {rows.min()} to {rows.max()} of {len(self.reader.metadata)}"
                )
            return Prefetcher(self, rows)

    class Prefetcher(base):  # type: ignore[misc,valid-type]
        """FFCV's prefetching thread, which ends, tells why, and can be joined."""

        def __init__(self, loader: Any, rows: NDArray[np.int64]) -> None:
            self.error: BaseException | None = None
            self.released = False
            self.ended = False
            super().__init__(loader, rows)
            _RUNNING.add(self)

        def run(self) -> None:
            """FFCV's loop; whatever ends it, the reader learns of it."""
            if self.cuda_streams[0] is not None:
                # A thread begins with GPU 0, where it would make a context for nothing.
                torch.cuda.set_device(self.cuda_streams[0].device)
            self.output_queue: Any = _Stoppable(self.output_queue, self.terminate_event)
            try:
                super().run()  # posts None itself at the end of the epoch
            except _Stopped:
                return
            except BaseException as error:
                self.error = error
                with contextlib.suppress(_Stopped):
                    self.output_queue.put(None)

        def run_pipeline(self, b_ix: int, ixes: Any, slot: int, event: Any) -> Any:
            """Make a batch in a slot of the ring, once the copy to the device of the last one there is done.

            FFCV lets the slot's stream wait, but not the host: a trainer that never waits for its GPU would
            get later pixels under earlier labels.
            """
            if self.cuda_streams[slot] is not None:
                self.cuda_streams[slot].synchronize()
            return super().run_pipeline(b_ix, ixes, slot, event)

        def __next__(self) -> Any:
            if self.ended:
                raise StopIteration
            try:
                return super().__next__()
            except StopIteration:
                self.ended = True
                if self.error is not None:
                    raise self.error from None
                raise

        def close(self) -> None:
            """End the thread and wait for it, and for its last copy: its buffers are free then.

            May be called again.
            """
            self.ended = True
            self.terminate_event.set()
            if not self.released:
                self.released = self.closed = True
                self.memory_context.__exit__(None, None, None)
            if self.is_alive() and self is not threading.current_thread():
                self.join()
            for stream in self.cuda_streams:
                if stream is not None:
                    stream.synchronize()

        def __del__(self) -> None:
            with contextlib.suppress(Exception):
                self.terminate_event.set()

    def pipeline(decoder: Any, device: torch.device) -> list[Any]:
        operations = [decoder, ToTensor()]
        if device.type == "cuda":
            operations.append(ToDevice(device, non_blocking=True))
        return operations

    return Runtime(Loader, Prefetcher, Decoder, pipeline, lib)


class _Stopped(Exception):
    """The reader has gone."""


class _Stoppable:
    """A full queue is waited for only until the reader has gone."""

    def __init__(self, inner: Any, gone: Any) -> None:
        self._inner, self._gone = inner, gone

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        while not self._gone.is_set():
            try:
                self._inner.put(item, timeout=0.05)
                return
            except queue.Full:
                continue
        raise _Stopped

    def get(self) -> Any:
        return self._inner.get()


_RUNNING: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that runs Numba or CUDA code while the interpreter is torn down crashes the process."""
    for prefetcher in list(_RUNNING):
        prefetcher.close()
