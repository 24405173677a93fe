"""Run a program on a GPU that is not there: all of PyTorch's own code for CUDA, and no kernel.

    python scripts/pretend_gpu [--numbers] -m pytest -m gpu tests/training/test_capture.py
    python scripts/pretend_gpu [--numbers] program.py ARGUMENTS

Needs a torch built for CUDA 13 with NVIDIA's wheels beside it, and a C++ compiler; no GPU, no driver.
`runtime.cpp` and `libraries.cpp` stand in for CUDA: PyTorch's allocator, streams and captures, Triton's and
Inductor's launchers and cuDNN's front end are the real ones, memory is the host's, and kernels do nothing.
What a capture would not survive on a GPU fails here too.

--numbers: every operator is computed, by PyTorch on the CPU in the same memory, when it is called or when the
graph that recorded it is replayed (`computed.py`). Not what torch.compile makes of them, so that is off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# The runtime's header includes this one of the compiler's, which PyTorch's wheels do not bring.
HOST_DEFINES = """#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline
#define __no_return__
#define __inline_hint__
#define CUDARTAPI
#define CUDARTAPI_CDECL
"""


def headers() -> Path | None:
    """The folder of cuda_runtime_api.h beside torch."""
    import torch

    if torch.version.cuda is None or not torch.version.cuda.startswith("13."):
        return None
    folder = Path(torch.__file__).parent.parent / "nvidia" / "cu13" / "include"
    return folder if (folder / "cuda_runtime_api.h").exists() else None


def build(folder: Path, include: Path) -> None:
    """The library, as libcuda.so.1 in `folder`."""
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    flags = f"-w -std=c++17 -O1 -shared -fPIC -I{folder} -I{include} -Wl,-soname,libcuda.so.1 -ldl -lpthread"
    sources = HERE / "runtime.cpp", HERE / "libraries.cpp"
    subprocess.run(["c++", *sources, "-o", folder / "libcuda.so.1", *flags.split()], check=True)


def main() -> int:
    """Build what stands in for CUDA and run the program on it; its exit status."""
    arguments = sys.argv[1:]
    numbers = arguments[:1] == ["--numbers"]
    include = headers()
    if include is None:
        print("pretend_gpu: needs a torch built for CUDA 13 and NVIDIA's wheels beside it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, include)
        environment = os.environ | {
            "LD_PRELOAD": str(folder / "libcuda.so.1"),
            "LD_LIBRARY_PATH": name,
            "TRITON_LIBCUDA_PATH": name,
            "PRETENDED_CUDA": str(folder / "libcuda.so.1"),
            "PYTHONPATH": os.pathsep.join(filter(None, (name, str(HERE), os.environ.get("PYTHONPATH")))),
            # Autotuning has timed kernels that do nothing: none of it may last.
            "TRITON_CACHE_DIR": name + "/triton",
            "TORCHINDUCTOR_CACHE_DIR": name + "/inductor",
        }
        if numbers:
            environment["TORCHDYNAMO_DISABLE"] = "1"
            (folder / "sitecustomize.py").write_text("import computed\n\ncomputed.install()\n")
        return subprocess.run([sys.executable, *arguments[numbers:]], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
