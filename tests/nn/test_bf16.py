"""Where bf16 is chosen by itself."""

from __future__ import annotations

import pytest
import torch

from arat_fast.nn.bf16 import bf16_pays, has_bf16_matrix_units
from arat_fast.training.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "units", "pays"),
    [(False, False, False, False), (False, True, False, True), (True, True, True, True)],
)
def test_on_a_cpu_by_its_instructions(
    amx: bool, avx512: bool, units: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert (has_bf16_matrix_units(CPU), bf16_pays(CPU)) == (units, pays)
    assert resolve_precision("auto", CPU) == ("bf16" if pays else "fp32")
    assert resolve_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_on_a_gpu_by_its_capability(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == precision
