"""Whichever torchvision is installed, importing it defines its operators once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OWN = f"""
import torch
_library = torch.library.Library("torchvision", "FRAGMENT")
_library.define("{SCHEMA}")
mark = "its own"
"""
BROKEN = """
raise RuntimeError("something else is wrong")
"""


def imported(package: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(package)
    script = (
        "from arat_fast.loaders.torchvision_import import torchvision; import torch; "
        "torch.ops.torchvision.nms; print(torchvision.mark)"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_torchvision_that_defines_its_operators_is_left_alone(tmp_path: Path) -> None:
    done = imported(OWN, tmp_path)
    assert done.stdout.strip() == "its own", done.stderr


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    assert "something else is wrong" in imported(BROKEN, tmp_path).stderr


def test_the_installed_one_gives_models_and_transforms() -> None:
    pytest.importorskip("PIL")
    script = (
        "from arat_fast.loaders.torchvision_import import torchvision; import torchvision as plain; "
        "assert plain is torchvision; from torchvision.transforms import v2; "
        "print(torchvision.models.resnet18().fc.out_features)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1000", done.stderr
