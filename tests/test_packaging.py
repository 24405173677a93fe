"""The package as pyproject.toml describes it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    found = {
        str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "arat_fast").rglob("__init__.py")
    }
    for top in ("kernels", "loaders"):
        found |= {
            "arat_fast." + str(p.parent.relative_to(ROOT)).replace("/", ".")
            for p in (ROOT / top).rglob("__init__.py")
        }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_dependency_is_bounded_and_pinned() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *(r for rs in extras.values() for r in rs)]:
        name = requirement.split("[")[0].split(">")[0]
        if name == "arat-fast":
            continue
        assert ">=" in requirement, requirement
        assert "<" in requirement or "==" in requirement, requirement
        assert name.lower() in pinned, f"{name} is not in constraints.txt"


def test_reference_shares_nothing_with_the_fast_path() -> None:
    code = "import sys, arat_fast.reference; print([m for m in sys.modules if m.startswith('arat_fast.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['arat_fast.reference']"


@pytest.mark.parametrize("word", ["/work/", "/root/"])
def test_no_path_of_one_machine_in_what_is_committed(word: str) -> None:
    result = subprocess.run(
        ["git", "grep", "-n", "-I", word, "--", ":!tests/test_packaging.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, 1):
        pytest.skip("not a git checkout")
    assert result.stdout == ""
