"""Where bf16 pays."""

from __future__ import annotations

import torch


def has_bf16_matrix_units(device: torch.device) -> bool:
    """Whether bf16 products run on matrix units: tensor cores from Ampere on, AMX tiles on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    return bool(torch.cpu._is_amx_tile_supported())
