"""What Inductor sees on a GPU, traced without one: the launches of an operator, and sources that compile."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import triton
from exactness import compiled_only

from arat_fast.benchmarks.compile_only import NoDriver
from arat_fast.kernels import augment, pgd, pgd_l2, random_start

pytestmark = [
    compiled_only,
    pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the GPU's driver"),
]


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver("sm_90"))


def launches(function, *shapes_and_dtypes):
    """Kernel launches in the functional graph of `function` on fake CUDA tensors, with their arguments."""
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        arguments = []
        for shape, dtype in shapes_and_dtypes:
            tensor = torch.empty(shape, dtype=dtype, device="cuda")
            images = tensor.ndim == 4 and dtype != torch.uint8
            arguments.append(tensor.to(memory_format=torch.channels_last) if images else tensor)
        graph = aot_export_joint_simple(lambda *a: (function(*a),), arguments, trace_joint=False)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [node.kwargs for node in calls if "triton_kernel_wrapper" in str(node.target)]


@pytest.mark.parametrize(
    ("norm", "side", "count"), [("Linf", 32, 1), ("Linf", 224, 1), ("L2", 32, 1), ("L2", 224, 2)]
)
def test_launches_of_a_pgd_step(norm, side, count):
    def step(x_adv, x, grad, eps):
        copy = torch.empty_like(x, dtype=torch.bfloat16)
        moved = x_adv.clone()
        pgd.pgd_step_(moved, x, grad, eps, 2 / 255, norm=norm, low_precision_out=copy)
        return moved + copy

    shape = (4, 3, side, side)
    scalar = ((), torch.float32)
    found = launches(step, *[(shape, torch.float32)] * 2, (shape, torch.bfloat16), scalar)
    assert len(found) == count
    # What is written is found by analysing the kernel; a missed tensor would be a silent race in Inductor.
    assert found[-1]["tensors_to_clone"] == ["out", "low_precision"]


@pytest.mark.parametrize("kind", ["uniform", "l2", "normal"])
def test_launches_of_a_random_start(kind):
    number = ((), torch.int64)
    found = launches(
        lambda x, seed, offset: random_start.random_start(x, 0.03, seed=seed, offset=offset, kind=kind),
        ((4, 3, 32, 32), torch.float32),
        number,
        number,
    )
    assert [call["tensors_to_clone"] for call in found] == [["out"]]


def test_launches_of_the_augmentation():
    number = ((), torch.int64)
    found = launches(
        lambda images, indices, seed, epoch: augment.random_crop_flip(
            images, indices, seed=seed, epoch=epoch, dtype=torch.bfloat16, resident=True
        ),
        ((50, 32, 32, 3), torch.uint8),
        ((8,), torch.int64),
        number,
        number,
    )
    assert [call["tensors_to_clone"] for call in found] == [["out"]]


def test_the_sources_that_inductor_copies_compile(tmp_path):
    """Inductor writes each kernel and the device functions that it calls into a file of its own."""
    wrapper = pytest.importorskip("torch._inductor.codegen.wrapper")
    copied = set()
    for module in (pgd, pgd_l2, random_start, augment):
        for case in module.compile_cases():
            if case.name in copied:
                continue
            copied.add(case.name)
            source = wrapper.user_defined_triton_kernel_transitive_closure_source_code(case.kernel)
            path = tmp_path / f"{case.name}.py"
            path.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{source}")
            specification = importlib.util.spec_from_file_location(case.name, path)
            copy = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(copy)
            getattr(copy, case.kernel.__name__).warmup(*case.args, grid=(1,), **case.meta)
    assert len(copied) == 6
