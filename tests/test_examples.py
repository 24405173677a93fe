"""The examples from an empty folder, with installed packages alone: the new way does what the old did."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--batch-size", "8", "--size", "8"]
# Arguments of a small run, packages that the example needs, how far losses or accuracies may differ: attacks
# start at random, so that they are not the same.
CASES = {
    "hand_written_loop": (["--iterations", "12", "--batch-size", "16", "--size", "8"], (), 0.3),
    "lightning_module": (["--batches", "4", *SMALL], ("lightning",), 0.3),
    "timm_split_bn": (["--iterations", "2", "--batch-size", "4", "--size", "32"], ("timm",), 0.3),
    "torchattacks_evaluation": (["--images", "40", "--size", "8"], ("torchattacks",), 0.1),
    "trades_loop": (["--iterations", "4", *SMALL], (), 0.3),
}
FIGURES = re.compile(r"before (\d+\.\d+), after (\d+\.\d+)")


def test_every_example_is_tested_and_short() -> None:
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert files.keys() == CASES.keys()
    for name, text in files.items():
        assert len(text.splitlines()) < 80, name
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert "Lines changed: " in docstring, name
        assert "before" in docstring, name
        assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text(), name


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str, tmp_path: Path) -> None:
    arguments, packages, tolerance = CASES[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    measure = ["--measure"] if name == "hand_written_loop" else []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, *measure],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    figures = [(float(before), float(after)) for before, after in FIGURES.findall(result.stdout)]
    assert figures, result.stdout
    assert all(abs(before - after) <= tolerance for before, after in figures), result.stdout
    assert list(tmp_path.iterdir()) == []
    if measure:
        assert figures[-1][0] < figures[0][0]  # it learns
        assert figures[-1][1] < figures[0][1]
        speeds = re.findall(r"^(before|after) +\d+\.\d images/s$", result.stdout, re.MULTILINE)
        assert speeds == ["before", "after"]
        assert re.search(
            r"^ratio +\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\), 9 turns, ", result.stdout, re.MULTILINE
        )
