"""Compile and load the C++ kernels, once a machine: `library("split_batch_norm")` is split_batch_norm.cpp.

Plain functions on pointers: no header of PyTorch, so a compiler takes seconds and what it makes serves every
torch. It is kept in the cache folder (`XDG_CACHE_HOME` or ~/.cache) under a name that says what it was made
of: source, compiler, flags and the processor's features. OpenMP's threads are PyTorch's own where both name
one runtime.

Without a compiler, or with ARAT_FAST_CPP=0, there is none, and PyTorch's kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["SWITCH", "has_cpp_kernels", "library"]

SWITCH = "ARAT_FAST_CPP"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # No errno and no traps; products and sums contract, wherever a value is computed twice.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
DIGEST = hashlib.sha256().digest_size
SECONDS = 120.0  # a compiler that takes longer is left alone
log = logging.getLogger(__name__)


def _features() -> str:
    """What -march=native looks at: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(named)])


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "arat-fast"


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _compile(source: Path, target: Path, compiler: str) -> None:
    """Write `target`, whole or not at all; several processes may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        with made.open("ab") as file:  # what follows its sections a loader does not read
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.replace(target)


def _is_whole(target: Path) -> bool:
    """Whether the file ends in its own digest: to load one that was cut short would end the process."""
    try:
        content = target.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _load(name: str) -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++, c++ or clang++, or the one that CXX names)")
    source = Path(__file__).with_name(f"{name}.cpp")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=SECONDS).stdout
    made_of = (source.read_bytes(), version, " ".join(FLAGS).encode(), _features().encode())
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    target = _folder() / f"{name}-{key}.so"
    try:
        if not _is_whole(target):
            _compile(source, target, compiler)
        return ctypes.CDLL(str(target))
    except OSError:  # a home that cannot be written, or not be run from: this process's own
        with tempfile.TemporaryDirectory(prefix="arat-fast-") as folder:
            own = Path(folder) / target.name
            _compile(source, own, compiler)
            return ctypes.CDLL(str(own))  # what is loaded stays when the file goes


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.cpp of this folder; None where it cannot be had, which is said once."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        return _load(name)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning(
            "the C++ kernels are left out, PyTorch's run instead: %s. Install g++ for the full speed "
            "on a CPU, or set %s=0 to say that this is meant",
            said[-1] if said else type(error).__name__,
            SWITCH,
        )
        return None


def has_cpp_kernels() -> bool:
    """Whether CPU tensors meet C++ kernels here; compiles them."""
    return library("split_batch_norm") is not None
