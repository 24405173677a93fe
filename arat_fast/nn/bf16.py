"""Where bf16 pays."""

from __future__ import annotations

import torch


def has_bf16_matrix_units(device: torch.device) -> bool:
    """Whether bf16 products run on matrix units: tensor cores from Ampere on, AMX tiles on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    return bool(torch.cpu._is_amx_tile_supported())


def bf16_pays(device: torch.device) -> bool:
    """Whether convolutions are faster in bf16: on matrix units, or by a CPU's AVX512-BF16 dot products.

    An iteration of ResNet-18 on an EPYC without AMX: twice as fast as in fp32.
    """
    avx512 = device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
    return avx512 or has_bf16_matrix_units(device)
