"""Whole training iterations, compiled for an H100 that is not there.

    python scripts/gpuless_iteration.py RECIPE…
    --model resnet8    network in the recipe's place
    --batch 128        images
    --attack-bn auto   batch or running statistics while attacking
    --precision bf16   or fp16, fp32
    --list             print every operator and kernel of the second iteration, with its count

Needs a torch built with CUDA and a C++ compiler, no GPU and no driver. Tensors have shapes, strides and a
device, but no memory (FakeTensor); torch.compile traces and lowers the iteration as on an H100, Triton
compiles every kernel for sm_90, and the second iteration runs the compiled code with launches left out. So it
shows what traces, lowers and compiles there, in which layouts, that nothing waits for a value or touches the
host's memory, and how many launches an iteration has; not that it is right, nor how fast.

Two small libraries stand in for what torch asks of CUDA while it traces backwards: which device is current,
and on which stream. They are built in a temporary folder and preloaded.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

DEVICE = r"""
#include <optional>
namespace c10::cuda {
signed char device_count() noexcept { return 1; }
signed char device_count_ensure_non_zero() { return 1; }
bool hasPrimaryContext(signed char) { return true; }
std::optional<signed char> getDeviceIndexWithPrimaryContext() { return (signed char)0; }
int GetDeviceCount(int* count) { *count = 1; return 0; }
int GetDevice(signed char* device) { *device = 0; return 0; }
int SetDevice(signed char, bool) { return 0; }
int MaybeSetDevice(signed char) { return 0; }
signed char ExchangeDevice(signed char) { return 0; }
signed char MaybeExchangeDevice(signed char) { return 0; }
signed char current_device() { return 0; }
void set_device(signed char, bool) {}
void device_synchronize() {}
}
struct Stream { signed char type = 1, index = 0; char padding[6] = {}; long id = 0; };
extern "C" Stream _ZN3c104cuda20getCurrentCUDAStreamEa(signed char) { return {}; }
extern "C" Stream _ZN3c104cuda20getDefaultCUDAStreamEa(signed char) { return {}; }
extern "C" void _ZN3c104cuda20setCurrentCUDAStreamENS0_10CUDAStreamE(Stream) {}
"""
DRIVER = r"""
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = *active = 0; }
"""
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    uuid="GPU-0",
    is_integrated=0,
)


def preload() -> int:
    """Build the stand-ins and run this script again beside them."""
    with tempfile.TemporaryDirectory() as folder:
        device, driver = Path(folder) / "device.so", Path(folder) / "libcuda.so.1"
        for path, source in ((device, DEVICE), (driver, DRIVER)):
            command = [
                "c++",
                "-w",
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-x",
                "c++",
                "-",
                "-o",
                str(path),
            ]
            subprocess.run([*command, f"-Wl,-soname,{path.name}"], input=source, text=True, check=True)
        environment = os.environ | {
            "LD_PRELOAD": str(device),
            "LD_LIBRARY_PATH": folder,
            "TORCHINDUCTOR_CACHE_DIR": folder + "/inductor",
            "TRITON_CACHE_DIR": folder + "/triton",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        return subprocess.run(
            [sys.executable, __file__, *sys.argv[1:]], env=environment, check=False
        ).returncode


LAUNCHES: list[str] = []  # kernels that compiled code launched, and operators that it or eager code called


def pretend() -> None:
    """Give torch, Inductor and Triton what they ask of a GPU while they trace and compile."""
    import torch
    import torch._C._dynamo.guards as guards
    import torch._dynamo.device_interface as interface
    import torch._inductor.config as inductor
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._subclasses.fake_tensor as fake
    import triton
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    from arat_fast.benchmarks.compile_only import NoDriver
    from arat_fast.nn import folding

    assert torch.version.cuda is not None, "this torch is built without CUDA"
    cuda: Any = torch.cuda
    state = torch.zeros(1, dtype=torch.uint8)
    nothing: Any = lambda *_, **__: None  # noqa: E731
    cuda.is_available, cuda.device_count = (lambda: True), (lambda: 1)
    cuda.get_device_properties, cuda.get_device_capability = (lambda *_: H100), (lambda *_: (9, 0))
    cuda.get_rng_state, cuda.set_rng_state, cuda._lazy_init = (lambda *_: state), nothing, nothing
    cuda.set_device, cuda._DeviceGuard = nothing, lambda _: contextlib.nullcontext()
    torch.random.fork_rng = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[assignment]
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn  # type: ignore[assignment]
    torch._fused_sgd_ = nothing  # has no shape function
    folding.float = lambda _: 0.0  # type: ignore[attr-defined]  # its error on two images: no values here
    for owner in (interface.CudaInterface, interface.CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda *_: H100)  # type: ignore[assignment]
        owner.current_device = staticmethod(lambda: 0)  # type: ignore[assignment]
    interface.CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)  # type: ignore[assignment]
    fake.init_gpu_context = nothing
    fake.FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment]
    fake.FakeTensorMode.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    # What would run on the device while compiling.
    inductor.joint_graph_constant_folding = inductor.shape_padding = False
    helpers.set_driver_to_gpu = helpers.set_driver_to_cpu = nothing  # type: ignore[assignment]
    triton.runtime.driver._active = NoDriver("sm_90")

    def compile_only(tuner: Any, *_: object, **__: object) -> None:
        tuner._precompile_worker()

    def launch(tuner: Any, *_: object, **__: object) -> None:
        LAUNCHES.append(tuner.fn.__name__)

    CachingAutotuner.precompile, CachingAutotuner.run = compile_only, launch  # type: ignore[assignment]
    # In C++ these would pass the fake tensors by.
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda t, size, stride, offset=0: torch.as_strided(t, size, stride, offset)


def on_the_gpu(module: Any, convert: Any = None, recurse: bool = True) -> Any:
    """Stands in for nn.Module._apply, which cannot swap fake tensors; without `convert`: to the fake GPU."""
    import torch

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with torch.no_grad():
        for layer in module.modules():
            for name, p in layer._parameters.items():
                if p is not None:
                    layer._parameters[name] = torch.nn.Parameter((convert or moved)(p), p.requires_grad)
            for name, b in layer._buffers.items():
                if b is not None:
                    layer._buffers[name] = (convert or moved)(b)
    return module


def iterate(recipe: str, options: argparse.Namespace) -> dict[str, int]:
    """Compile and run two iterations; what the second launches, by name."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    from arat_fast.config import load_recipe, resolved
    from arat_fast.training.build import build_fast, build_optimizer
    from arat_fast.training.step import TrainStep

    torch._dynamo.reset()
    config = load_recipe(recipe)
    config = resolved(
        dataclasses.replace(
            config,
            model=options.model,
            attack=dataclasses.replace(config.attack, steps=2, bn=options.attack_bn),
            lbgat=dataclasses.replace(config.lbgat, teacher=options.model),
        )
    )
    network, method = build_fast(config, 3, 10, None)
    torch.nn.Module._apply = on_the_gpu  # type: ignore[assignment]
    with FakeTensorMode():
        for module in (network, method):
            on_the_gpu(module)
        if hasattr(method, "_zero"):
            method._zero = torch.zeros_like(method.coefficient).requires_grad_()
        parameters = [*network.parameters(), *(p for p in method.parameters() if p.requires_grad)]
        step = TrainStep(
            network,
            method,
            build_optimizer(config, parameters, fused=True),
            attack=config.attack,
            precision=options.precision,
            capture=False,
            guard=True,
        )
        images = torch.empty(options.batch, 32, 32, 3, dtype=torch.uint8, device="cuda")
        labels, indices = (torch.empty(options.batch, dtype=torch.int64, device="cuda") for _ in range(2))
        step(images, labels, indices)
        LAUNCHES.clear()
        dispatch = FakeTensorMode.dispatch

        def noted(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            LAUNCHES.append(str(func))
            made = dispatch(mode, func, types, args, kwargs or {})
            if str(func) != "prim.device.default":
                for tensor in tree_leaves((args, kwargs, made)):
                    if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
                        raise AssertionError(f"{func} touches a tensor on the host: no graph can capture it")
            return made

        FakeTensorMode.dispatch = noted  # type: ignore[method-assign]
        metrics = step(images, labels, indices)
        FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]
    assert all(value.is_cuda for value in metrics.values())
    return dict(collections.Counter(LAUNCHES).most_common())


def main() -> int:
    """Compile the recipes named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--attack-bn", choices=("auto", "batch", "running"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if "device.so" not in os.environ.get("LD_PRELOAD", ""):
        return preload()
    warnings.simplefilter("ignore")
    pretend()
    for recipe in options.recipes:
        found = iterate(recipe, options)
        kernels = sum(count for name, count in found.items() if name.startswith("triton_"))
        own = sum(count for name, count in found.items() if name.startswith("arat_fast."))
        convolutions = sum(count for name, count in found.items() if "convolution" in name)
        print(
            f"{recipe}, {options.model}: compiled; with 2 attack steps {convolutions} calls of convolutions, "
            f"{own} of our operators, {kernels} of Inductor's kernels",
            flush=True,
        )
        if options.list:
            print("\n".join(f"{count:6} {name}" for name, count in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
