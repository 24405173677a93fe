"""The whole ARAT iteration, and a training pass through split BatchNorm against timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arat_fast.benchmarks.floors import iteration_floors
from arat_fast.benchmarks.split_pass import passes
from arat_fast.benchmarks.step_variants import (
    Setting,
    baseline,
    build,
    check_agreement,
    data,
    element_bytes,
    observe,
    variant_names,
)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_step(statistics: str, compare: Callable[..., None], device: torch.device) -> None:
    torch.compiler.reset()
    on_gpu = device.type == "cuda"
    setting = Setting("resnet18", 128 if on_gpu else 8, 32, 10 if on_gpu else 2)
    base, ours = ("eager", "fast") if statistics == "batch" else ("eager-running", "fast-folded")
    names = [name for name in variant_names(setting, device) if baseline(name) == base]
    images, labels = data(setting, device)
    variants = {name: build(setting, device, name) for name in names}
    observed = {name: observe(iterate, images, labels) for name, iterate in variants.items()}
    element = element_bytes(ours, setting, device)
    folded = statistics == "running"
    floors = iteration_floors(setting.model, setting.side, setting.steps, setting.batch, element, folded)
    order = [ours, *(name for name in names if name != ours)]
    compare(
        f"ARAT iteration, {statistics} statistics, {setting.model}, batch {setting.batch}",
        {name: lambda iterate=variants[name]: iterate(images, labels) for name in order},
        check=lambda: check_agreement(observed, setting, device),
        floors={"flop": floors.flop * setting.batch, "bytes": floors.bytes * setting.batch},
        model=setting.model,
        batch=setting.batch,
        steps=setting.steps,
    )


def test_split_batch_norm_pass(compare: Callable[..., None], device: torch.device) -> None:
    batch, side = (128, 64) if device.type == "cuda" else (8, 64)
    calls, check = passes(device, batch, side)
    compare(
        f"split BN training pass, 2 x {batch} images of {side}", calls, check=check, batch=batch, side=side
    )
