"""PGD attacks: ours against eager PyTorch and, where it is installed, torchattacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arat_fast.benchmarks.attack_variants import (
    BATCH,
    attack_baseline,
    attack_element,
    attack_names,
    build_attack,
    check_attacks,
    networks,
)
from arat_fast.benchmarks.floors import attack_floors
from arat_fast.benchmarks.step_variants import Setting, data


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_attack(statistics: str, compare: Callable[..., None], device: torch.device) -> None:
    torch.compiler.reset()
    on_gpu = device.type == "cuda"
    setting = Setting("resnet18", 128 if on_gpu else 8, 32, 10 if on_gpu else 2)
    images, labels = data(setting, device)
    base = BATCH if statistics == "batch" else "eager"
    names = [name for name in attack_names(setting, device) if attack_baseline(name) == base]
    ours = "fast-batch" if statistics == "batch" else "fast-folded"
    both = networks(setting, device, images)
    attacks = {name: build_attack(setting, device, name, both) for name in [base, *names]}
    order = [ours, *(name for name in attacks if name != ours)]
    floors = attack_floors(
        setting.model,
        setting.side,
        setting.steps,
        setting.batch,
        attack_element(ours, setting, device),
        folded=ours == "fast-folded",
    )
    compare(
        f"PGD-{setting.steps}, {statistics} statistics, {setting.model}, batch {setting.batch}",
        {name: lambda attack=attacks[name]: attack(images, labels) for name in order},
        check=lambda: check_attacks(attacks, {base: both}, images, labels),
        floors={"flop": floors.flop * setting.batch, "bytes": floors.bytes * setting.batch},
        model=setting.model,
        batch=setting.batch,
        steps=setting.steps,
    )
