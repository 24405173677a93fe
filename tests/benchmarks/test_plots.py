"""Pictures of benchmark records, and the records' journey through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arat_fast.benchmarks import everything, plots
from arat_fast.commands import bench
from arat_fast.errors import UserError

CONDITIONS = {
    "model": "resnet18",
    "batch": 128,
    "steps": 10,
    "precision": "bf16",
    "compile": True,
    "device": "cuda",
    "gpu": {"name": "Some GPU"},
    "cpu": "Some CPU",
    "threads": 2,
}


def step_record(batch: int = 128) -> dict[str, Any]:
    variants = {}
    for k, (name, base) in enumerate(
        [
            ("eager", "eager"),
            ("fast", "eager"),
            ("eager-running", "eager-running"),
            ("fast-folded", "eager-running"),
        ]
    ):
        speed = 1000.0 * (k + 1) * batch / 128
        variants[name] = {
            "images_per_second": speed,
            "spread": [0.9 * speed, 1.1 * speed],
            "ratio": 1.0 + k,
            "baseline": base,
            "mfu": 0.2,
            "peak_memory_bytes": 1 << 30,
            "profile": {"by_kind": {"convolution": 0.75, "other": 0.25}} if name == "fast" else None,
        }
    return {"benchmark": "step", "conditions": CONDITIONS | {"batch": batch}, "variants": variants}


def attack_record() -> dict[str, Any]:
    record = step_record()
    variants = {
        name.replace("eager-running", "eager-batch").replace("fast-folded", "fast-batch"): figures
        | {"ms_per_step": 3.0, "baseline": figures["baseline"].replace("running", "batch")}
        for name, figures in record["variants"].items()
    }
    return record | {"benchmark": "attack", "variants": variants}


def kernel_record() -> dict[str, Any]:
    rows = [
        {
            "kernel": "pgd_step Linf",
            "shape": "2x3",
            "variant": variant,
            "microseconds": 10.0,
            "bytes_moved": 10**6,
        }
        for variant in ("ours", "eager", "inductor", "copy", "view")
    ]
    return {"benchmark": "kernels", "conditions": CONDITIONS, "results": rows}


def test_every_record_has_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [step_record(128), step_record(512), attack_record(), kernel_record()]
    names = {path.name for path in plots.draw(records, tmp_path) if path.suffix == ".png"}
    assert names == {
        "ladder_resnet18_128.png",
        "memory_resnet18_128.png",
        "time_resnet18_128.png",
        "ladder_resnet18_512.png",
        "memory_resnet18_512.png",
        "time_resnet18_512.png",
        "attack_resnet18_128.png",
        "kernels.png",
        "throughput_resnet18.png",
    }
    assert all((tmp_path / name).stat().st_size > 5_000 for name in names)


def test_plots_command_names_a_file_that_is_no_record(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"cannot read the record .*broken\.json"):
        bench.main(["plots", str(broken), "--out", str(tmp_path)])
    for text in ("[1]", '{"benchmark": "step"}', '{"what": "make train"}'):
        broken.write_text(text)
        with pytest.raises(UserError, match=r"broken\.json is no record of .*step or attack or kernels"):
            bench.main(["plots", str(broken), "--out", str(tmp_path)])
    broken.write_text('{"benchmark": "kernels", "conditions": {}, "results": []}')
    with pytest.raises(UserError, match="cannot make the folder"):
        bench.main(["plots", str(broken), "--out", str(broken)])
    with pytest.raises(UserError, match="did you mean 'kernels'"):
        bench.main(["kernles"])


def test_summary_has_a_row_for_each_of_ours() -> None:
    loaders = {
        "torchvision": {"images_per_second": 10.0, "ratio": 1.0},
        "resident": {"images_per_second": 50.0, "ratio": 5.0},
    }
    record = {
        "kernels": kernel_record(),
        "attack": attack_record(),
        "step": step_record(),
        "loaders": {"loaders": loaders},
    }
    rows = everything.rows(json.loads(json.dumps(record)))
    assert [row[0] for row in rows] == [
        "pgd_step Linf, 2x3",
        "attack fast",
        "attack fast-batch",
        "step fast",
        "step fast-folded",
        "loader resident",
    ]
    assert rows[0][1:] == ["10.0 us", "eager", "1.00x", "100 % of copy"]
    assert rows[3][2:] == ["eager", "2.00x", "20 % MFU"]
