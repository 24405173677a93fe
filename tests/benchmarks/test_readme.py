"""The README's figures are those of bench/results/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bench_scripts import load

readme = load("readme")
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_readme_shows_the_committed_results() -> None:
    assert readme.inserted(README, readme.text()) == README, "run: python bench/readme.py"


def test_picture_is_of_the_committed_results() -> None:
    pytest.importorskip("PIL")
    name, record = readme.picture_of()
    assert readme.drawn_from(readme.picture_file(name)) == readme.digest(record), (
        "run: python bench/readme.py"
    )


def test_readme_says_plainly_whether_a_gpu_was_measured() -> None:
    measured = any(readme.on_gpu(record) for record in readme.records("step").values())
    assert ("GPU figures are not yet measured" in README) == (not measured)


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    for path in readme.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    name, record = readme.picture_of(tmp_path)
    before, digest = readme.text(tmp_path), readme.digest(record)
    record["variants"]["fast"]["images_per_second"] *= 1.5
    (tmp_path / name).write_text(json.dumps(record))
    assert readme.text(tmp_path) != before
    assert readme.digest(readme.picture_of(tmp_path)[1]) != digest


def test_a_gpu_s_record_replaces_the_sentence_and_is_drawn(tmp_path: Path) -> None:
    _, record = readme.picture_of()
    (tmp_path / "step_cpu.json").write_text(json.dumps(record))
    gpu = record | {"conditions": record["conditions"] | {"device": "cuda", "gpu": {"name": "A GPU"}}}
    (tmp_path / "step_gpu.json").write_text(json.dumps(gpu))
    assert "not yet measured" not in readme.text(tmp_path)
    assert "A GPU" in readme.text(tmp_path)
    assert readme.picture_of(tmp_path)[0] == "step_gpu.json"


def test_markers_are_needed_once_each() -> None:
    assert readme.inserted(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb", "new") == (
        f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb"
    )
    for wrong in ("nothing", readme.END + readme.BEGIN, f"{readme.BEGIN}{readme.BEGIN}{readme.END}"):
        with pytest.raises(SystemExit, match="needs the markers"):
            readme.inserted(wrong, "new")
