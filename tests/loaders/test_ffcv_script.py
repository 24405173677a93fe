"""scripts/ffcv.sh: says what it lacks and lets the rest go on; does nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import needs_ffcv

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ffcv.sh"


def ffcv_script(venv: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT), str(venv)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the few commands that the script needs, but no compiler and no package manager."""
    if not SCRIPT.exists():
        pytest.skip("no scripts/ beside the tests")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "dirname", "env", "id", "mkdir", "mktemp", "rm", "tail"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def venv_with_python(tmp_path: Path, script: str) -> Path:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return tmp_path / "venv"


def test_without_system_packages_it_names_them_and_the_rest_goes_on(bare: Path, tmp_path: Path) -> None:
    result = ffcv_script(venv_with_python(tmp_path, "exit 1"), str(bare))
    assert result.returncode == 0
    assert "apt-get install --no-install-recommends" in result.stderr
    assert "training works without it, with --loader resident or torchvision" in result.stderr


def test_without_an_environment_it_says_which_to_make(bare: Path, tmp_path: Path) -> None:
    result = ffcv_script(tmp_path / "nowhere", str(bare))
    assert result.returncode == 1
    assert "make it first with scripts/setup.sh" in result.stderr


@needs_ffcv
def test_a_second_run_does_nothing(bare: Path, tmp_path: Path) -> None:
    result = ffcv_script(venv_with_python(tmp_path, f'exec "{sys.executable}" "$@"'), str(bare))
    assert result.returncode == 0
    assert result.stderr == "ffcv: FFCV 1.0.2 is there\n"
