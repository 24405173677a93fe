"""The README's speed tables and picture, from the committed results: python bench/readme.py [--check].

Everything between the markers in README.md is written by this script; a test fails when it differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Record = Mapping[str, Any]


def records(kind: str, folder: Path = RESULTS) -> dict[str, Record]:
    """Committed records of one benchmark by file name."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: r for name, r in found.items() if isinstance(r, dict) and r.get("benchmark") == kind}


def on_gpu(record: Record) -> bool:
    """Whether the record's figures are a GPU's."""
    return record["conditions"]["device"] != "cpu"


def machine(record: Record) -> str:
    """The processor's or the GPU's name."""
    given = record["conditions"]
    threads = f"{given['threads']} thread{'s' if given['threads'] != 1 else ''}"
    return given["gpu"]["name"] if on_gpu(record) else f"{given['cpu']}, {threads}"


def _conditions(record: Record) -> str:
    given = record["conditions"]
    return (
        f"torch {given['packages']['torch']}, {given['date'][:10]}, load average {given['load_average'][0]}"
    )


def _times(figures: Mapping[str, Any]) -> str:
    low, high = figures["ratio_spread"]
    return f"{figures['ratio']:.2f}× ({low:.2f}–{high:.2f})"


def step_rows(record: Record) -> Iterator[str]:
    """A row a variant."""
    for name, figures in record["variants"].items():
        memory = figures["peak_memory_bytes"]
        same = name == figures["baseline"]
        bold = "**" if name in ("fast", "fast-folded") else ""
        yield (
            f"| {bold}{name}{bold} | {figures['images_per_second']:,.1f} "
            f"| {'1' if same else bold + _times(figures) + bold + ' of ' + figures['baseline']} "
            f"| {100 * figures['mfu']:.0f} % | {'–' if memory is None else f'{memory / 2**20:,.0f} MiB'} |"
        )


def step_table(name: str, record: Record) -> str:
    """One iteration's variants."""
    given = record["conditions"]
    head = (
        f"A whole ARAT iteration (PGD-{given['steps']}), {given['model']}, batch {given['batch']}, "
        f"{given['precision']}{', compiled' if given['compile'] else ''}, {machine(record)}; "
        f"{_conditions(record)} (`bench/results/{name}`):"
    )
    lines = ["| variant | images/s | times as fast (least–most of the turns) | MFU | peak memory |"]
    lines += ["|---|---|---|---|---|", *step_rows(record)]
    if any(figures["mfu"] > 1 for figures in record["variants"].values()):
        lines += ["", "An MFU above 100 %: other processes slowed the product that it is measured against."]
    return head + "\n\n" + "\n".join(lines)


def suite_table(name: str, record: Record) -> str:
    """Ours against every other variant of the cases that other projects' code takes part in."""
    lines = ["| case | ours | times as fast as |", "|---|---|---|"]
    for case, figures in record["cases"].items():
        if not case.startswith(("PGD", "split BN", "loaders", "ARAT")):
            continue
        others = [
            f"{other} {v['ours_is_faster_by']:.2f}× ({v['ratio_spread'][0]:.2f}–{v['ratio_spread'][1]:.2f})"
            for other, v in figures["variants"].items()
            if other
            in ("eager", "eager-batch", "eager-running", "torchattacks", "two passes", "timm", "torchvision")
        ]
        lines.append(f"| {case} | {figures['ours']} | {', '.join(others)} |")
    peers = ", ".join(f"{p} {v}" for p, v in record["conditions"]["peers"].items()) or "no peers installed"
    head = (
        f"Against other projects, {machine(record)}; {peers}, {_conditions(record)} (`bench/results/{name}`):"
    )
    return head + "\n\n" + "\n".join(lines)


def picture_of(folder: Path = RESULTS) -> tuple[str, Record]:
    """(file name, record) of the step that is drawn: a GPU's where there is one."""
    steps = records("step", folder)
    name = next((n for n, r in steps.items() if on_gpu(r)), next(iter(steps)))
    return name, steps[name]


def digest(record: Record) -> str:
    """Of a record's content; the picture carries it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def picture_file(name: str, folder: Path = RESULTS) -> Path:
    """The picture of a record."""
    return folder / name.replace(".json", ".png")


def text(folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    steps, suites = records("step", folder), records("suite", folder)
    parts = []
    if not any(on_gpu(r) for r in steps.values()):
        parts.append("**GPU figures are not yet measured.** Those below are a CPU's.")
    parts += [step_table(name, record) for name, record in steps.items()]
    parts += [suite_table(name, record) for name, record in suites.items()]
    name, record = picture_of(folder)
    given = record["conditions"]
    picture = picture_file(name, folder).name
    parts.append(
        f"![images/s of every variant, {given['model']}, batch {given['batch']}](bench/results/{picture})"
    )
    parts.append(
        "Regenerate with `arat-fast bench step --json FILE`, `make bench` and `python bench/readme.py`."
    )
    return "\n\n".join(parts)


def inserted(readme: str, block: str) -> str:
    """The README with `block` between its markers. Raises SystemExit where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md needs the markers {BEGIN} and {END}, once each and in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def drawn_from(picture: Path) -> str | None:
    """The digest that a picture carries; None where there is no picture."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get("Source")


def draw(folder: Path = RESULTS) -> Path:
    """Write the picture."""
    from arat_fast.benchmarks.plots import ladder_axes

    name, record = picture_of(folder)
    target = picture_file(name, folder)
    with ladder_axes(record) as figure:
        figure.savefig(target, dpi=160, metadata={"Software": None, "Source": digest(record)})
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when they differ")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    wanted = inserted(readme.read_text(), text())
    name, record = picture_of()
    stale = drawn_from(picture_file(name)) != digest(record)
    if options.check:
        return int(wanted != readme.read_text() or stale)
    readme.write_text(wanted)
    if stale:
        draw()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
