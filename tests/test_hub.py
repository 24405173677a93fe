"""`hubconf.py` through torch.hub, from another folder and without an installation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from arat_fast import reference

ROOT = Path(__file__).resolve().parents[1]
# An editable installation is found by a finder of its own; without it only what torch.hub itself adds is.
UNINSTALLED = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
root, weights = sys.argv[1:]
import torch
x, labels = torch.load("batch.pt")
model = torch.hub.load(root, "resnet8", weights=weights, source="local")
attack = torch.hub.load(root, "pgd", model, eps=0.1, alpha=0.05, steps=2, source="local")
x_adv = attack(x, labels)
plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
faster = torch.hub.load(root, "accelerate", plain, source="local")
assert faster.report.replaced == ("1",), faster.report
import arat_fast
assert arat_fast.__file__.startswith(root)
# What it needs and does not name: nothing of these.
assert not {"pydantic", "yaml", "tyro", "torchvision"} & set(sys.modules)
torch.save((model(x).detach(), x_adv), "out.pt")
"""


def test_without_an_installation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = reference.resnet8()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    torch.save((x, labels), tmp_path / "batch.pt")
    result = subprocess.run(
        [sys.executable, "-c", UNINSTALLED, str(ROOT), "weights.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    logits, x_adv = torch.load(tmp_path / "out.pt")
    reference.use_branch(theirs, "adv")
    torch.testing.assert_close(logits, theirs.eval()(x), rtol=1e-4, atol=1e-5)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_entry_points() -> None:
    """All that torch.hub.list would show; each says what it is."""
    sys.path.insert(0, str(ROOT))
    try:
        import hubconf
    finally:
        sys.path.remove(str(ROOT))
    entries = {n: v for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    assert entries.keys() == {"accelerate", "pgd", "resnet18", "resnet8", "wrn_34_10"}
    assert all(entry.__doc__ for entry in entries.values())
    with torch.device("meta"):
        assert sum(p.numel() for p in hubconf.wrn_34_10().parameters()) == 46_182_906
        single = hubconf.resnet18(num_classes=100, branches=("adv",))
    assert single.get_submodule("linear").out_features == 100
