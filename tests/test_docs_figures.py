"""What the documentation counts is what the program counts, and the picture of the floors is true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arat_fast.benchmarks.floors import attack_floors, iteration_floors
from arat_fast.config import EMRConfig, LBGATConfig, TRADESConfig, TrainConfig
from arat_fast.training.cost import iteration_cost

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Of docs/images/floors.svg; a floor imports from itself and those below.
FLOORS = (
    {"kernels", "loaders"},
    {"nn", "acceleration"},
    {"attacks", "models"},
    {"methods"},
    {"training", "evaluation", "analysis", "export"},
    {"cli", "commands", "benchmarks"},
)
BESIDE = {"reference", "config", "errors", "pixels", "environment"}
EMR = EMRConfig(1 / 128)
COSTS: dict[str, dict[str, Any]] = {
    "Standard": {"method": "standard"},
    "AT": {"method": "at"},
    "ARAT": {"method": "arat"},
    "TRADES": {"method": "trades"},
    "TRADES, duplicate forward": {"method": "trades", "trades": TRADESConfig(duplicate_forward=True)},
    "MART": {"method": "mart"},
    "MAIL-AT": {"method": "mail-at"},
    "MAIL-TRADES": {"method": "mail-trades"},
    "MAIL-MART": {"method": "mail-mart"},
    "LBGAT, β 0": {"method": "lbgat"},
    "LBGAT, β 6": {"method": "lbgat", "lbgat": LBGATConfig(beta=6.0)},
    "ARREST-style": {"method": "arrest"},
    "AT + EMR": {"method": "at", "emr": EMR},
    "TRADES + EMR": {"method": "trades", "emr": EMR},
    "MART + EMR": {"method": "mart", "emr": EMR},
    "ARAT + EMR": {"method": "arat", "emr": EMR},
}


def test_cost_of_each_method_is_what_is_counted() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "methods" / "baselines.md").read_text().splitlines()
        if line.count("|") == 9
    ][2:]
    assert [row[0] for row in rows] == list(COSTS)
    at = iteration_cost(TrainConfig(method="at"), (32, 32, 3), 10).iteration_flop
    for name, *cells, flop, ratio in rows:
        cost = iteration_cost(TrainConfig(**COSTS[name]), (32, 32, 3), 10)
        teacher = "–" if not cost.teacher_parameters else "trained" if cost.teacher_backwards else "frozen"
        counts = (cost.forwards, cost.input_backwards, cost.full_backwards, cost.double_backwards)
        assert cells == [*map(str, counts), teacher], name
        assert (flop, ratio) == (f"{cost.iteration_flop / 1e9:.2f}", f"{cost.iteration_flop / at:.2f}"), name


def test_floors_of_an_iteration_are_what_is_counted() -> None:
    page = (DOCS / "performance.md").read_text()
    half, full = (iteration_floors("resnet18", 32, 10, 128, size, False) for size in (2, 4))
    attack = attack_floors("resnet18", 32, 10, 128, 2, False)
    figures = f"{half.flop / 1e9:.2f} GFLOP | {half.bytes / 1e6:.0f} MB | {full.bytes / 1e6:.0f} MB"
    shares = f"{attack.flop / half.flop:.0%} of the arithmetic, {attack.bytes / half.bytes:.0%} of the bytes"
    assert f"| ResNet-18 | {figures} | {shares.replace('%', ' %')} |" in page
    folded = iteration_floors("resnet18", 32, 10, 128, 2, True)
    assert f"moves {folded.bytes / 1e6:.0f} MB instead of {half.bytes / 1e6:.0f}" in page


def imported(file: Path) -> Iterator[str]:
    """First names below arat_fast that a file imports."""
    package = ROOT if file.is_relative_to(ROOT / "arat_fast") else ROOT / "arat_fast"
    depth = len(file.relative_to(ROOT).parts) - 1 + (package != ROOT)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("arat_fast."))
        elif isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            first, *rest = (node.module or "").split(".")
            if first == "arat_fast":
                yield from rest[:1] or (a.name for a in node.names)


def test_imports_go_down() -> None:
    level = {name: k for k, floor in enumerate(FLOORS) for name in floor}
    seen = set()
    for folder in ("arat_fast", "kernels", "loaders"):
        for file in (ROOT / folder).rglob("*.py"):
            place = file.relative_to(ROOT / "arat_fast") if folder == "arat_fast" else file.relative_to(ROOT)
            name = place.parts[0].removesuffix(".py")
            if name == "__init__":
                continue
            assert name in level or name in BESIDE, f"{name} is on no floor of docs/images/floors.svg"
            seen.add(name)
            for other in imported(file):
                assert name != "reference", f"{place} imports arat_fast.{other}"
                if name in level and other in level:
                    assert level[other] <= level[name], f"{place} imports {other} from above"
                else:
                    assert name in level or other in BESIDE, f"{place} imports {other}"
    assert seen >= set(level) | BESIDE
