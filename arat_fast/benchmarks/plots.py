"""Pictures of benchmark records: readable in grey, drawn from the JSON that was committed.

    arat-fast bench plots RECORD.json ... --out FOLDER

ladder: images/s of every variant; throughput: over the batch size, from several records; memory: peaks;
time: where an iteration's time goes; attack: milliseconds a step; kernels: their bandwidth under the roof
that a copy of as many bytes is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arat_fast.analysis.figures import COLUMN, axes, save, series
from arat_fast.benchmarks.attack_variants import BATCH
from arat_fast.benchmarks.step_variants import RUNNING
from arat_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
OURS, THEIRS = "0.25", "0.72"
# Greys that differ by a fifth each, and hatches where two of a kind would touch.
SHADES = (
    ("0.15", ""),
    ("0.55", ""),
    ("0.8", ""),
    ("1.0", "////"),
    ("1.0", "...."),
    ("0.7", "xxxx"),
    ("1.0", ""),
    ("0.4", "++++"),
    ("0.9", "----"),
)
KIND_ORDER = (
    "convolution", "BatchNorm", "compiled, mixed", "PGD", "optimizer", "foreach: casts, guard",
    "augmentation", "classifier, losses", "other",
)  # fmt: skip


def _machine(record: Record) -> str:
    given = record["conditions"]
    on_gpu = given["device"] != "cpu" and given["gpu"] is not None
    threads = f"{given['threads']} thread{'s' if given['threads'] != 1 else ''}"
    return str(given["gpu"]["name"]) if on_gpu else f"{given['cpu']}, {threads}"


def _title(record: Record) -> str:
    given = record["conditions"]
    how = f"{given['precision']}{', compiled' if given['compile'] else ''}"
    return f"{given['model']}, batch {given['batch']}, PGD-{given['steps']}\n{_machine(record)}, {how}"


def _name(kind: str, record: Record) -> str:
    given = record["conditions"]
    return f"{kind}_{given['model']}_{given['batch']}"


def _is_ours(name: str) -> bool:
    return name.startswith(("fast", "ours"))


def _bars(ax: Axes, names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    """Horizontal bars from the top down, ours dark, a label at each end."""
    places = range(len(names))
    ax.barh(places, values, height=0.62, color=[OURS if _is_ours(name) else THEIRS for name in names])
    for place, value, label in zip(places, values, labels, strict=True):
        ax.annotate(label, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.28 * max(values))


def _in_order(record: Record, second: str) -> list[str]:
    """Variants by rate, slowest first: those compared with the first baseline, then those with `second`."""
    variants = record["variants"]

    def place(name: str) -> tuple[bool, bool, float]:
        base = variants[name]["baseline"]
        return base == second, name != base, variants[name]["images_per_second"]

    return sorted(variants, key=place)


def _whiskers(ax: Axes, names: Sequence[str], variants: Mapping[str, Any]) -> None:
    for place, name in enumerate(names):
        low, high = variants[name]["spread"]
        ax.plot([low, high], [place + 0.4, place + 0.4], color="0.45", linewidth=1.0, solid_capstyle="butt")


@contextmanager
def ladder_axes(record: Record) -> Iterator[Figure]:
    """A figure of every variant's images/s; the thin line beneath a bar is the spread."""
    names = _in_order(record, RUNNING)
    variants = record["variants"]
    with axes(1, COLUMN, 0.75 + 0.24 * len(names)) as (figure, (ax,)):
        values = [variants[name]["images_per_second"] for name in names]
        labels = [f"{v:,.4g}  ({variants[n]['ratio']:.2f}x)" for n, v in zip(names, values, strict=True)]
        _bars(ax, names, values, labels)
        _whiskers(ax, names, variants)
        _separate(ax, names, variants, RUNNING)
        ax.set_xlim(0, 1.45 * max(values))
        ax.set_xlabel("images/s (ratio to the group's first)")
        ax.set_title(_title(record), loc="left")
        yield figure


def ladder(record: Record, folder: Path) -> list[Path]:
    """Images/s of every variant of the step."""
    with ladder_axes(record) as figure:
        return save(figure, folder, _name("ladder", record))


def _separate(ax: Axes, names: Sequence[str], variants: Mapping[str, Any], second: str) -> None:
    first = sum(variants[name]["baseline"] != second for name in names)
    if 0 < first < len(names):
        ax.axhline(first - 0.5, color="0.6", linewidth=0.5)


def memory(record: Record, folder: Path) -> list[Path]:
    """Peak memory of every variant, each in a process of its own."""
    variants = record["variants"]
    names = [n for n in _in_order(record, RUNNING) if variants[n]["peak_memory_bytes"] is not None]
    with axes(1, COLUMN, 0.75 + 0.24 * len(names)) as (figure, (ax,)):
        values = [variants[name]["peak_memory_bytes"] / 2**20 for name in names]
        _bars(ax, names, values, [f"{value:,.0f}" for value in values])
        _separate(ax, names, variants, RUNNING)
        ax.set_xlabel("peak memory (MiB)")
        ax.set_title(_title(record), loc="left")
        return save(figure, folder, _name("memory", record))


def time_by_kind(record: Record, folder: Path) -> list[Path]:
    """Where an iteration's time goes: shares of the profiled variants, stacked."""
    profiles = {name: v["profile"] for name, v in record["variants"].items() if v["profile"] is not None}
    kinds = [k for k in KIND_ORDER if any(p["by_kind"].get(k, 0) > 0.005 for p in profiles.values())]
    with axes(1, COLUMN, 1.4 + 0.3 * len(profiles)) as (figure, (ax,)):
        left = [0.0] * len(profiles)
        for k, kind in enumerate(kinds):
            color, hatch = SHADES[k % len(SHADES)]
            shares = [100 * profile["by_kind"].get(kind, 0.0) for profile in profiles.values()]
            ax.barh(
                range(len(profiles)), shares, 0.6, left, color=color, hatch=hatch, edgecolor="black",
                linewidth=0.4, label=kind,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, shares, strict=True)]
        ax.set_yticks(range(len(profiles)), list(profiles))
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(0, 100)
        ax.set_xlabel("share of the busy time (%)")
        figure.legend(
            loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.0, title=_title(record),
            alignment="left",
        )  # fmt: skip
        return save(figure, folder, _name("time", record))


def attack(record: Record, folder: Path) -> list[Path]:
    """Milliseconds a PGD step of every attack, slowest first."""
    names = _in_order(record, BATCH)
    variants = record["variants"]
    with axes(1, COLUMN, 0.75 + 0.24 * len(names)) as (figure, (ax,)):
        values = [variants[name]["ms_per_step"] for name in names]
        labels = [f"{v:.3g}  ({variants[n]['ratio']:.2f}x)" for n, v in zip(names, values, strict=True)]
        _bars(ax, names, values, labels)
        _separate(ax, names, variants, BATCH)
        ax.set_xlim(0, 1.45 * max(values))
        ax.set_xlabel("ms a step (ratio to the group's first)")
        ax.set_title(_title(record), loc="left")
        return save(figure, folder, _name("attack", record))


def throughput(records: Sequence[Record], folder: Path) -> list[Path]:
    """Images/s over the batch size; `records` are of one model and device."""
    ordered = sorted(records, key=lambda record: int(record["conditions"]["batch"]))
    batches = [int(record["conditions"]["batch"]) for record in ordered]
    wanted = ("fast", "strong-compiled", "strong", "eager", "fast-folded", RUNNING)
    names = [n for n in wanted if sum(n in r["variants"] for r in ordered) > 1]
    with axes(1, COLUMN, 2.35 + 0.13 * ((len(names) + 1) // 2)) as (figure, (ax,)):
        for k, name in enumerate(names):
            points = [
                (b, r["variants"][name])
                for b, r in zip(batches, ordered, strict=True)
                if name in r["variants"]
            ]
            speeds = [v["images_per_second"] for _, v in points]
            ax.plot([b for b, _ in points], speeds, label=name, **series(k)._asdict())
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.minorticks_off()
        ax.set_ylim(0, None)
        ax.set_xlabel("batch")
        ax.set_ylabel("images/s")
        title = f"{ordered[0]['conditions']['model']}, {_machine(ordered[0])}"
        figure.legend(loc="outside upper left", ncols=2, title=title, alignment="left")
        return save(figure, folder, f"throughput_{ordered[0]['conditions']['model']}")


# Marker of each family of kernels, fill of each variant.
FAMILIES = {"pgd_step": "o", "random_start": "v", "random_crop_flip": "s", "split_bn": "D"}
FILLS = {"eager": "white", "inductor": "0.7", "ours": "black"}


def kernels(record: Record, folder: Path) -> list[Path]:
    """Bandwidth of each kernel's variants over the bytes that must move, under a copy's."""
    from matplotlib.lines import Line2D

    roof: dict[float, float] = {}
    with axes(1, COLUMN, 3.1) as (figure, (ax,)):
        for row in record["results"]:
            moved, name = row["bytes_moved"] / 1e6, row["variant"]
            rate = moved / row["microseconds"]  # MB/us is TB/s
            if name == "copy":
                roof[moved] = max(1e3 * rate, roof.get(moved, 0.0))
            elif name in FILLS:
                family = next(f for f in FAMILIES if row["kernel"].startswith(f))
                ax.plot(
                    moved, 1e3 * rate, zorder=3 + (name == "ours"), **_marker(FAMILIES[family], FILLS[name])
                )
        # Of copies of as many bytes the fastest: kernels of one size were timed with several.
        ax.plot(sorted(roof), [roof[moved] for moved in sorted(roof)], color="0.45", linewidth=1.0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("bytes that must move (MB)")
        ax.set_ylabel("GB/s")
        there = {row["variant"] for row in record["results"]}
        shapes = [Line2D([], [], label=name, **_marker(m, "black")) for name, m in FAMILIES.items()]
        fills = [Line2D([], [], label=n, **_marker("o", fill)) for n, fill in FILLS.items() if n in there]
        fills.append(Line2D([], [], color="0.45", linewidth=1.0, label="copy"))
        figure.legend(
            handles=[*shapes, *fills], loc="outside upper left", ncols=2, title=_machine(record),
            alignment="left", handlelength=1.2,
        )  # fmt: skip
        return save(figure, folder, "kernels")


def _marker(shape: str, fill: str) -> dict[str, Any]:
    return {
        "marker": shape,
        "markerfacecolor": fill,
        "markeredgecolor": "black",
        "markeredgewidth": 0.5,
        "markersize": 4,
        "linestyle": "none",
    }


# Benchmarks that have pictures, and what their records must hold.
PICTURED = {
    "step": {"conditions", "variants"},
    "attack": {"conditions", "variants"},
    "kernels": {"conditions", "results"},
}


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Every picture that the records have the figures for; returns the files, PDF and PNG.

    Raises UserError where matplotlib is missing, TrainingError for a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from None
    paths: list[Path] = []
    steps: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        kind = record.get("benchmark")
        if kind == "kernels" and record["results"]:
            paths += kernels(record, folder)
        elif kind == "attack":
            paths += attack(record, folder)
        elif kind == "step":
            paths += ladder(record, folder)
            variants = record["variants"].values()
            if any(v["peak_memory_bytes"] is not None for v in variants):
                paths += memory(record, folder)
            if any(v["profile"] is not None for v in variants):
                paths += time_by_kind(record, folder)
            steps.setdefault((record["conditions"]["model"], _machine(record)), []).append(record)
    for group in steps.values():
        if len({record["conditions"]["batch"] for record in group}) > 1:
            paths += throughput(group, folder)
    return paths


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="arat-fast bench plots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of `arat-fast bench`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args(list(arguments))
    records = []
    for path in options.records:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the record {path}: {error}") from None
        kind = record.get("benchmark") if isinstance(record, dict) else None
        if kind not in PICTURED or not PICTURED[kind] <= record.keys():
            raise UserError(f"{path} is no record of `arat-fast bench {' or '.join(PICTURED)}` --json")
        records.append(record)
    for path in draw(records, options.out):
        print(path)
    return 0
