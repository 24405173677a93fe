"""Ratios, ceilings, floors and profiles: the arithmetic behind every figure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from arat_fast import reference
from arat_fast.benchmarks import floors
from arat_fast.benchmarks.ceilings import Ceilings, describe, main, measure_ceilings
from arat_fast.benchmarks.conditions import conditions
from arat_fast.benchmarks.profiling import (
    Profile,
    covered,
    format_profile,
    kind_of,
    of_trace,
    profiled,
    summed,
)
from arat_fast.benchmarks.timing import ratio, take_turns

CPU = torch.device("cpu")


def test_variants_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(calls, CPU, repeats=3, count=2)
    assert order == list("aabb" * 3)
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())


def test_a_slow_turn_of_both_cancels_in_the_ratio() -> None:
    median, spread = ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert median == 2.0
    assert spread == [2.0, 2.2]


def test_ceilings_are_rates_of_this_device(tmp_path) -> None:
    found = measure_ceilings(CPU, small=True)
    assert 1e8 < found.fp32_flop_per_second < 1e14
    assert 1e8 < found.copy_bytes_per_second < 1e13
    assert Ceilings(1.0, None, 3.0).flop_per_second("bf16") == 1.0
    assert Ceilings(1.0, 2.0, 3.0).flop_per_second("fp16") == 2.0
    assert Ceilings(1.0, 2.0, 3.0).flop_per_second("fp32") == 1.0
    assert Ceilings(1.0, None, 4.0).best(Ceilings(2.0, 5.0, 3.0)) == Ceilings(2.0, 5.0, 4.0)
    assert Ceilings(1.0, None, 4.0).best(Ceilings(2.0, None, 3.0)).bf16_flop_per_second is None
    assert "copy 1e+03 GB/s" in describe(Ceilings(1.0, 2.0, 1e12))


def test_conditions_name_what_a_result_needs() -> None:
    found = conditions(CPU, Ceilings(1.0, None, 3.0), model="resnet8")
    wanted = {"date", "revision", "packages", "cpu", "threads", "device", "load_average", "model", "peers"}
    assert wanted <= set(found)
    assert found["copy_bytes_per_second"] == 3.0
    json.dumps(found)


def test_kernels_and_ceilings_need_no_configuration() -> None:
    """A GPU machine may lack pydantic and the like; its kernels can be measured all the same."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'pydantic', 'annotated_types', 'yaml', 'tqdm'): sys.modules[name] = None\n"
        "import arat_fast.benchmarks.kernels, arat_fast.benchmarks.ceilings\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ceilings_refuse_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from arat_fast.errors import UserError

    with pytest.raises(UserError, match="sees no GPU"):
        main(["--device", "cuda"])


def test_traffic_of_a_network_counted_by_hand() -> None:
    """ResNet-8 on 8-pixel images: 16, 32 and 64 channels at 8, 4 and 2 pixels."""
    found = floors.network_traffic("resnet8", 8)
    one, two, three = 16 * 64, 32 * 16, 64 * 4
    # Stem, two convolutions a block, and a shortcut in the last two blocks; a BatchNorm after each.
    assert found.batch_norm == found.conv_out == 3 * one + 3 * two + 3 * three
    assert found.residual == one + two + three
    assert found.joins == 2 * one + one + two  # the stem's BatchNorm has no residual
    assert found.joins_folded == one + one + two
    assert found.conv_in == (3 * 64 + one + one) + (one + two + one) + (two + three + two)
    network = reference.resnet8()
    assert found.weights == sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))


def test_floors_of_the_paper_s_iteration() -> None:
    found = floors.iteration_floors("resnet18", 32, 10, 128, 2, folded=False)
    assert found.flop == pytest.approx(28.88e9, rel=1e-3)  # methods.md's 28.9 GFLOP, counted again
    folded = floors.iteration_floors("resnet18", 32, 10, 128, 2, folded=True)
    assert folded.bytes < found.bytes
    by_flop, by_bytes, together = found.limits(790e12, 4.3e12)
    assert by_flop == pytest.approx(27_350, rel=1e-3)
    assert together == pytest.approx(1 / (1 / by_flop + 1 / by_bytes))


def test_kinds_by_the_innermost_name_that_says_something() -> None:
    assert kind_of(["aten::copy_", "aten::convolution_backward"]) == "convolution"
    assert kind_of(["_pgd_linf_kernel"]) == "PGD"
    assert kind_of(["small_forward_kernel"]) == "BatchNorm"
    assert kind_of(["sm90_xmma_fprop_implicit_gemm_bf16"]) == "convolution"
    assert kind_of(["cutlass_80_tensorop_s1688gemm"]) == "classifier, losses"
    assert kind_of(["void at::native::multi_tensor_apply_kernel<FusedSgd>"]) == "optimizer"
    assert kind_of(["multi_tensor_apply_kernel<CopyFunctor>"]) == "foreach: casts, guard"
    assert kind_of(["cudnn::bn_fw_tr_1C11_kernel_NHWC"]) == "BatchNorm"
    assert kind_of(["triton_red_fused_mean_3"]) == "compiled, mixed"
    assert kind_of(["aten::mean"]) == "other"


def test_a_gpu_trace_gives_idle_time_and_launches() -> None:
    def event(cat: str, name: str, start: float, length: float) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": start, "dur": length}

    trace = [
        event("kernel", "conv_fprop", 0, 40),
        event("kernel", "_pgd_linf_kernel", 30, 20),  # on another stream, overlapping
        event("gpu_memcpy", "Memcpy DtoD", 90, 10),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        event("cuda_runtime", "cudaGraphLaunch", 2, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 3, 1),
        event("cpu_op", "aten::conv2d", 0, 5),
    ]
    found = of_trace(trace, iterations=2)
    assert covered([(0, 40), (30, 50), (90, 100)]) == 60
    assert found.idle_share == pytest.approx(0.4)
    assert found.launches == 1
    assert found.kernels == 1.5
    assert found.by_kind["convolution"] == pytest.approx(40 / 70)
    assert found.top[0][:2] == ("conv_fprop", "convolution")
    assert "no kernel runs for 40.0 %" in format_profile(found)
    with pytest.raises(RuntimeError, match="no kernel"):
        of_trace(trace[3:], 1)


def test_profile_of_a_cpu_finds_the_convolutions() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    x = torch.rand(8, 8, 32, 32, requires_grad=True)
    found = profiled(lambda: layer(x).sum().backward(), CPU, 2)
    assert isinstance(found, Profile)
    assert found.by_kind["convolution"] > 0.5
    assert sum(found.by_kind.values()) == pytest.approx(1)
    assert found.idle_share is None
    assert len(found.top) <= 10
    assert summed([], 1)["busy_seconds"] >= 0
