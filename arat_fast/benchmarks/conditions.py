"""Under what conditions a figure was measured. Without them it is not a result."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from arat_fast.environment import environment
from arat_fast.kernels.cpp_library import has_cpp_kernels

if TYPE_CHECKING:
    from arat_fast.benchmarks.ceilings import Ceilings

PEERS = ("torchattacks", "timm")


def peers() -> dict[str, str]:
    """Versions of the packages that are measured beside this one, where they are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def float32_products(device: torch.device) -> str:
    """How float32 convolutions are computed: "tf32" or "ieee"."""
    if device.type != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def conditions(device: torch.device, ceilings: Ceilings | None, **more: object) -> dict[str, object]:
    """Versions, device, date, the machine's load, its ceilings, and whatever else the benchmark names."""
    load = [round(value, 2) for value in os.getloadavg()]
    found: dict[str, object] = environment(device) | {
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "load_average": load,
        "peers": peers(),
        "float32_convolutions": float32_products(device),
    }
    if device.type == "cpu":
        found["cpp_kernels"] = has_cpp_kernels()
    if ceilings is not None:
        found |= ceilings.fields()
    return found | more
