"""FFCV's faults, each fenced in: a process with a time limit where the fault is a hang or a crash."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_data import needs_ffcv, random_images, raw_beton, run_script

pytestmark = needs_ffcv

OPEN = """
import sys, threading, torch
from pathlib import Path
from small_data import CPU, random_images
from arat_fast.loaders.beton_set import load_beton
from arat_fast.loaders.ffcv import FFCVStream

def stream(workers, batch_size=16):
    source = load_beton(Path(sys.argv[2]))
    return FFCVStream(source, batch_size=batch_size, seed=0, device=CPU, workers=workers)

def ffcv_threads():
    return [t for t in threading.enumerate() if type(t).__name__ == "Prefetcher"]
"""


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beton")
    raw_beton(folder, random_images(count=1_000))
    return folder / "images.beton"


@pytest.mark.parametrize("workers", [1, 3])
def test_leaving_early_in_every_way_ends_the_threads(beton: Path, workers: int) -> None:
    result = run_script(
        OPEN
        + f"""
s = stream({workers})
for batch in s.epoch(1):  # an early break
    break
del batch
assert not ffcv_threads(), ffcv_threads()
try:  # an exception in the loop
    for batch in s.epoch(1):
        raise KeyError("mine")
except KeyError:
    pass
assert not ffcv_threads(), ffcv_threads()
batches = s.epoch(1)  # next() past the end, more than once
assert len(list(batches)) == len(s) == 63
assert [next(batches, None), next(batches, None)] == [None, None]
never = s.epoch(2)  # never begun
begun = s.epoch(2)
next(begun)
a, b = s.epoch(1), s.epoch(2)  # two at once, of one stream and of another
other = stream(2)
for x, y, z in zip(a, b, other.epoch(1), strict=True):
    assert torch.equal(x.images, z.images)
print("done", torch.get_num_threads())
# The interpreter exits with `begun` in mid-epoch and its thread alive.
assert len(ffcv_threads()) == 1
""",
        str(beton),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("done")
    assert result.stderr == ""  # nothing is printed at exit either


@pytest.mark.parametrize("workers", [1, 3])
def test_control_c_ends_the_process(beton: Path, workers: int) -> None:
    script = (
        OPEN + f"\nfor k in range(10**6):\n for b in stream({workers}).epoch(1):\n  print('r', flush=True)\n"
    )
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + script
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(beton)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell inherits "ignore SIGINT"; the process under test must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "r\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    # 1 where the interrupt met FFCV between two epochs and another error followed from it: seen once in some
    # twenty runs, on a busy machine.
    assert process.returncode in (-signal.SIGINT, 1), errors
    assert "KeyboardInterrupt" in errors


def test_twenty_epochs_without_growth_of_threads_or_memory(beton: Path) -> None:
    result = run_script(
        OPEN
        + """
import gc
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
s = stream(2)
sizes, threads = [], []
for epoch in range(1, 21):
    for batch in s.epoch(epoch):
        pass
    for batch in s.epoch(epoch):
        break
    gc.collect()
    sizes.append(resident())
    threads.append(threading.active_count())
print(threads, [size >> 20 for size in sizes], file=sys.stderr)
assert len(set(threads[1:])) == 1
assert sizes[-1] - sizes[4] < 4 << 20
""",
        str(beton),
    )
    assert result.returncode == 0, result.stderr


def test_torch_keeps_its_threads_and_random_state(beton: Path) -> None:
    result = run_script(
        OPEN
        + """
import numpy as np
torch.set_num_threads(2)
states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
counts = []
for batch in stream(1).epoch(1):
    counts.append(torch.get_num_threads())
assert set(counts) == {2}
torch.rand(100_000).sum()
assert torch.equal(states[0], torch.random.get_rng_state()) is False  # rand moved it
import numba
numba.set_num_threads(1)  # FFCV's import left Numba's own function in place
""",
        str(beton),
    )
    assert result.returncode == 0, result.stderr


def test_an_error_in_the_pipeline_reaches_the_loop(beton: Path) -> None:
    result = run_script(
        OPEN
        + """
s = stream(2)
make, calls = s._decoder, []
def failing(indices, epoch):
    decoder = make(indices, epoch)
    right = decoder.decode
    def decode(places, out):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("in the third batch")
        return right(places, out)
    decoder.decode = decode
    return decoder
s._decoder = failing
seen = 0
try:
    for batch in s.epoch(1):
        seen += 1
except ZeroDivisionError as error:
    print(seen, error)
assert not ffcv_threads()
""",
        str(beton),
    )
    assert result.stdout == "2 in the third batch\n", result.stderr


def test_rows_outside_the_file_are_refused(beton: Path) -> None:
    from small_data import CPU

    from arat_fast.loaders.beton_set import load_beton
    from arat_fast.loaders.ffcv import FFCVStream

    stream = FFCVStream(load_beton(beton), batch_size=8, seed=0, device=CPU)
    import numpy as np

    operations = stream._ffcv.pipeline(stream._decoder(np.arange(3), 1), CPU)
    loader = stream._ffcv.loader(stream.source.file, 8, 1, operations)
    with pytest.raises(IndexError, match="rows reach from 0 to 1000 of 1000"):
        loader.batches(np.array([0, 1_000]))


def test_a_missing_or_other_ffcv_is_named(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from arat_fast.errors import UserError
    from arat_fast.loaders import ffcv_runtime

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.1.0")
    with pytest.raises(UserError, match=r"FFCV 1\.1\.0 is installed; only 1\.0\.2 is known to work"):
        ffcv_runtime.runtime.__wrapped__()


def test_a_second_process_starts_from_the_cache(beton: Path) -> None:
    seconds = []
    for _ in range(2):
        result = run_script(
            OPEN
            + """
import time
begin = time.process_time()
next(stream(1).epoch(1))
print(time.process_time() - begin)
""",
            str(beton),
        )
        assert result.returncode == 0, result.stderr
        seconds.append(float(result.stdout))
    assert seconds[1] < 3.0  # 12 s of compilation without the cache


def test_a_slot_s_last_copy_to_the_device_ends_before_it_is_filled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FFCV makes the slot's stream wait, and not the host, whose next pixels go where the copy reads."""
    from arat_fast.loaders.ffcv_runtime import runtime  # imports FFCV

    prefetcher = runtime().prefetcher
    order: list[object] = []

    class Stream:
        def __init__(self, slot: int) -> None:
            self.slot = slot

        def synchronize(self) -> None:
            order.append(("waited for", self.slot))

    base = prefetcher.__mro__[1]
    monkeypatch.setattr(base, "run_pipeline", lambda _, *arguments: order.append(arguments))
    monkeypatch.setattr(base, "__del__", lambda _: None)
    one = prefetcher.__new__(prefetcher)
    one.cuda_streams = [Stream(0), Stream(1), None]
    one.run_pipeline(7, "rows", 1, "event")
    assert order == [("waited for", 1), (7, "rows", 1, "event")]
    one.run_pipeline(8, "rows", 2, None)  # without a GPU there is no stream
    assert order[2:] == [(8, "rows", 2, None)]
