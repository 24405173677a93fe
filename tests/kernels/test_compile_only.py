"""The check that compiles kernels for GPUs that are not there, and the benchmark cases' agreement."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from arat_fast.benchmarks import cases, compile_only
from arat_fast.benchmarks.kernels import Timing, run, table

PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd2 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, 0x10;
    st.global.v4.b32 [ %rd5 + 0 ], { %r1, %r2, %r3, %r4 };
"""
AMDGCN = """
    buffer_load_dwordx4 v[2:5], v30, s[4:7], 0 offen
    global_load_dword v0, v14, s[12:15]
    global_load_ubyte v0, v1, s[0:1]
    global_load_short_d16_hi v0, v1, s[0:1]
    s_load_dwordx8 s[4:11], s[0:1], 0x8
    global_store_dwordx4 v30, v[2:5], s[4:5]
"""
TTGIR = """
    %g = tt.load %p, %m : tensor<2048x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %x = amdg.buffer_load %x[%i] {contiguity = 4 : i32} : tensor<64x32xf32, #blocked> loc(#loc2)
    %s = tt.load %q : tensor<4x!tt.ptr<f32>, #blocked1> loc(#loc3)
    %e = tt.load %eps : !tt.ptr<f32> loc(#loc4)
"""


def test_load_widths_are_read_from_the_machine_code():
    assert compile_only.nvidia_loads(PTX) == Counter({16: 2, 8: 1, 2: 1})
    assert compile_only.amd_loads(AMDGCN) == Counter({16: 1, 4: 1, 2: 1, 1: 1})
    # 16 elements a thread: 32 bytes of bf16 and 64 of fp32; the small and the scalar load are no streams.
    assert compile_only.stream_bytes(TTGIR, 128) == 32 + 64
    assert compile_only.load_width(Counter({16: 6, 4: 2}), 96) == 16
    assert compile_only.load_width(Counter({16: 2, 4: 16}), 96) == 4
    assert compile_only.load_width(Counter(), 0) is None


SCRIPT = """
import dataclasses, itertools, sys
import arat_fast.kernels.compile_cases as compile_cases
from arat_fast.benchmarks import compile_only
from arat_fast.kernels import pgd
from arat_fast.kernels import pgd_l2
case = next((pgd_l2 if "branchless" in sys.argv[2] else pgd).compile_cases())
case = dataclasses.replace(case, **eval(sys.argv[2]))
compile_only.all_cases = lambda: [case]
sys.exit(compile_only.main(["--json", sys.argv[1], "--target", "sm_90", "--target", "gfx942"]))
"""


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ("{}", 0, "0 problems"),
        ("{'load_bytes': 32}", 1, "loads 16 bytes"),
        ("{'args': ()}", 1, "does not compile"),
        ("{'branchless': True}", 1, ".rn.f32 branches to a slow path"),
        ("{'meta': case.meta | {'num_warps': 1, 'maxnreg': 24}}", 1, "spills"),
    ],
)
def test_compiles_without_a_gpu(tmp_path, change, status, message):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    target = tmp_path / "out" / "kernels.json"
    command = [sys.executable, "-c", SCRIPT, str(target), change]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    assert message in result.stdout + result.stderr
    entries = json.loads(target.read_text())
    if status == 0:
        assert [entry["target"] for entry in entries] == ["sm_90", "gfx942"]
        names = {"kernel", "specialisation", "target", "registers", "spills", "shared_bytes", "load_bytes"}
        assert all(set(entry) == names for entry in entries)
        assert all(entry["registers"] > 8 and entry["load_bytes"] == 16 for entry in entries)


def test_refuses_to_interpret(tmp_path):
    command = [sys.executable, "-m", "arat_fast.benchmarks.compile_only"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "TRITON_INTERPRET is set" in result.stderr


def test_benchmark_variants_agree(device):
    seen = set()
    for case in cases.all_cases(device, small=True):
        plain = {name: variant for name, variant in case.variants.items() if name in ("ours", "eager")}
        dataclasses.replace(case, variants=plain).check()
        assert next(iter(case.variants)) == "ours"
        assert case.bytes_moved > 0
        seen.add(case.kernel)
    assert {"pgd_step Linf", "pgd_step L2", "random_start uniform", "random_crop_flip"} <= seen


def test_a_table_line_says_the_share_of_copy_bandwidth():
    timings = [
        Timing("pgd_step", "2x3", variant, microseconds, 0.5, 15, 1_000_000)
        for variant, microseconds in (("ours", 10.0), ("eager", 60.0), ("copy", 8.0))
    ]
    assert timings[0].gigabytes_per_second == 100
    assert table(timings) == "pgd_step, 2x3: 10.0 us +- 0.5, 100 GB/s, 80 % of copy; eager 60.0 us (6.00x)"


def test_timings_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run() == 2
    assert "need a GPU" in capsys.readouterr().err
