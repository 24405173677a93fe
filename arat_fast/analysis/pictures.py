"""A picture for each analysis, from the plain values that it was measured as.

`data` maps a series' label (a run, a form of the loss) to its values; its place gives its look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arat_fast.analysis.figures import COLUMN, HEIGHT, Series, axes, layer_axis, save, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Data = Mapping[str, Any]


def _width(layers: int) -> float:
    return COLUMN if layers <= 12 else min(7.0, COLUMN + 0.12 * (layers - 12))


def _values(values: Sequence[float | None]) -> list[float]:
    """Numbers for a line, a gap where there is none."""
    return [float("nan") if v is None else v for v in values]


def _legend(figure: Figure, labels: Iterable[str], even_one: bool = False) -> None:
    """The series above the axes, where no data can lie under them; none for a single one.

    In two columns where they are many and short enough for the width of the page's.
    """
    labels = list(labels)
    if len(labels) > 1 or even_one:
        two = len(labels) > 3 and max(map(len, labels)) <= 20
        figure.legend(loc="outside upper left", ncols=2 if two else 1)


def conflict_by_layer(data: Data, folder: Path, suffix: str = "") -> list[Path]:
    """Share of conflicting coordinates (grey line: unrelated gradients) and cosine similarity, by layer."""
    names = list(next(iter(data.values()))["layers"])
    with axes(2, _width(len(names)), 3.6 + 0.13 * len(data)) as (figure, (share, cosine)):
        for k, (label, result) in enumerate(data.items()):
            look = series(k)._asdict()
            layers = [result["layers"][name] for name in names]
            # A layer that the invariance term does not reach is a gap, not a layer without conflict.
            shares = [None if c["cosine"] is None else 100 * c["share"] for c in layers]
            overall = 100 * result["overall"]["share"]
            share.plot(range(len(names)), _values(shares), label=f"{label} ({overall:.1f} % in all)", **look)
            cosine.plot(range(len(names)), _values([c["cosine"] for c in layers]), **look)
        share.axhline(50, color="0.75", linewidth=0.6, zorder=0)
        share.set_ylabel("in conflict (%)")
        share.set_ylim(0, max(55, 1.08 * share.dataLim.y1))
        cosine.set_ylabel("cosine similarity")
        cosine.axhline(0, color="0.75", linewidth=0.6, zorder=0)
        layer_axis(cosine, names)
        figure.legend(loc="outside upper left")
        return save(figure, folder, f"conflict_by_layer{suffix}")


def conflict_over_training(data: Data, folder: Path, suffix: str = "") -> list[Path]:
    """Share of conflicting coordinates over the iterations of training; data: label -> conflict lines."""
    with axes(1, COLUMN, HEIGHT + 0.1 * len(data)) as (figure, (ax,)):
        for k, (label, lines) in enumerate(data.items()):
            every = max(1, len(lines) // 10)
            ax.plot(
                [line["step"] for line in lines],
                [100 * line["overall"]["share"] for line in lines],
                label=label,
                markevery=(every * k // len(data), every),
                **series(k)._asdict(),
            )
        ax.axhline(50, color="0.75", linewidth=0.6, zorder=0)
        ax.set_xlabel("iteration")
        ax.set_ylabel("coordinates in conflict (%)")
        _legend(figure, data)
        return save(figure, folder, f"conflict_over_training{suffix}")


def _by_layer(
    data: Mapping[str, Mapping[str, float]], label_y: str, folder: Path, name: str, log: bool
) -> list[Path]:
    names = list(next(iter(data.values())))
    with axes(1, _width(len(names)), 2.6 + 0.1 * len(data)) as (figure, (ax,)):
        for k, (label, layers) in enumerate(data.items()):
            ax.plot(range(len(names)), [layers[n] for n in names], label=label, **series(k)._asdict())
        if log and any(value > 0 for layers in data.values() for value in layers.values()):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(label_y)
        layer_axis(ax, names)
        _legend(figure, data)
        return save(figure, folder, name)


def mixture_distance(data: Data, folder: Path, suffix: str = "") -> list[Path]:
    """Relative distance of adversarial from clean features, by layer."""
    values = {
        label: {n: v["relative"] for n, v in result["layers"].items()} for label, result in data.items()
    }
    return _by_layer(values, r"$\|z'-z\|_2\ /\ \|z\|_2$", folder, f"mixture_distance{suffix}", log=False)


def bn_divergence(data: Data, folder: Path, suffix: str = "") -> list[Path]:
    """Divergence of clean from adversarial statistics as measured on the test images, by layer."""
    values = {
        label: {n: v["divergence"]["measured"]["mean"] for n, v in result["layers"].items()}
        for label, result in data.items()
    }
    return _by_layer(values, "symmetric KL (nats)", folder, f"bn_divergence{suffix}", log=True)


def bn_variance(data: Data, folder: Path, suffix: str = "") -> list[Path]:
    """Variance over epochs of the running means, by layer; data: label -> branch -> layer -> variance."""
    values = {
        f"{label}, {branch} branch": layers
        for label, branches in data.items()
        for branch, layers in branches.items()
    }
    return _by_layer(values, "variance over epochs", folder, f"bn_variance{suffix}", log=True)


def margin_distribution(data: Data, folder: Path) -> list[Path]:
    """The effective margin: a histogram of one run, cumulative distributions of several, which can be told
    apart where outlines could not. A grey line at 0.
    """
    import numpy as np

    with axes(1, COLUMN, HEIGHT + 0.1 * len(data)) as (figure, (ax,)):
        ends = [np.quantile(result["values"], [0.002, 0.998]) for result in data.values()]
        low, high = min(0.0, *(e[0] for e in ends)), max(e[1] for e in ends)
        for k, (label, result) in enumerate(data.items()):
            values = np.sort(result["values"])
            if len(data) == 1:
                edges = _edges(low, high, int(np.clip(np.sqrt(len(values)), 10, 50)))
                weights = np.full(len(values), 100 / len(values))
                ax.hist(values.clip(low, high), edges, weights=weights, color="0.8", ec="k", linewidth=0.5)
                continue
            shown = f"{label} ({100 * result['share_not_positive']:.1f} % at most 0)"
            look = series(k)
            cumulative = 100 * np.arange(1, len(values) + 1) / len(values)
            ax.step(values, cumulative, where="post", label=shown, color=look.color, linestyle=look.linestyle)
        if len(data) > 1:
            ax.set_xlim(low, high)
            ax.set_ylim(0, 100)
        ax.axvline(0, color="0.5", linewidth=0.6)
        ax.set_xlabel(r"effective margin ($L_2$, pixel range 1)")
        ax.set_ylabel("test images (%)" if len(data) == 1 else "test images below (%)")
        _legend(figure, data)
        return save(figure, folder, "margin")


def _edges(low: float, high: float, bins: int) -> list[float]:
    """Edges of about as many bins of one width from low to high, one of them at 0."""
    width = (high - low) / bins or 1.0  # all values alike: one bin
    return [width * k for k in range(math.floor(low / width), math.floor(high / width) + 2)]


def tradeoff(data: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Robust against clean accuracy; data: label -> results of its runs.

    One run: a point with its 95 % binomial errors. Several (seeds): small points, and their mean with their
    standard deviation.
    """
    with axes(1, COLUMN, HEIGHT + 0.1 * len(data)) as (figure, (ax,)):
        for k, (label, results) in enumerate(data.items()):
            _tradeoff_series(ax, label, results, series(k))
        steps = sorted({r["robust"]["steps"] for r in chain(*data.values())})
        ax.set_xlabel("clean accuracy (%)")
        ax.set_ylabel(f"accuracy under PGD-{'/'.join(map(str, steps))} (%)")
        ax.margins(0.08)
        _legend(figure, data, even_one=True)
        return save(figure, folder, "tradeoff")


def _tradeoff_series(ax: Axes, label: str, results: Sequence[Any], look: Series) -> None:
    import numpy as np

    x, y = ([100 * r[kind]["accuracy"] for r in results] for kind in ("clean", "robust"))
    if len(results) == 1:
        errors = [100 * results[0][kind]["error_95"] for kind in ("clean", "robust")]
    else:
        errors = [float(np.std(values, ddof=1)) for values in (x, y)]
        ax.plot(x, y, look.marker, color=look.color, markersize=2, alpha=0.5)
    ax.errorbar(np.mean(x), np.mean(y), errors[1], errors[0], fmt="none", ecolor=look.color, elinewidth=0.5)
    ax.plot(np.mean(x), np.mean(y), look.marker, color=look.color, label=label, markersize=4.5)


def accuracy_over_eps(data: Data, folder: Path) -> list[Path]:
    """Accuracy under PGD over the radius, with 95 % binomial errors; a grey line at the runs' own."""
    norms = {result["norm"] for result in data.values()}
    scale = 255.0 if norms == {"Linf"} and _whole_levels(data) else 1.0
    with axes(1, COLUMN, HEIGHT + 0.1 * len(data)) as (figure, (ax,)):
        for k, (label, result) in enumerate(data.items()):
            look, points = series(k), result["points"]
            x, y = [scale * p["eps"] for p in points], [100 * p["accuracy"] for p in points]
            errors = [100 * p["error_95"] for p in points]
            ax.errorbar(x, y, errors, fmt="none", ecolor=look.color, elinewidth=0.5)
            ax.plot(x, y, label=label, **look._asdict())
        for eps in {result["eps"] for result in data.values()}:
            ax.axvline(scale * eps, color="0.75", linewidth=0.6, zorder=0)
        norm = r"$L_\infty$" if norms == {"Linf"} else "$L_2$" if norms == {"L2"} else "of each run's norm"
        ax.set_xlabel(rf"$\epsilon$ ({norm}, {'1/255' if scale > 1 else 'pixel range 1'})")
        ax.set_ylabel("accuracy (%)")
        ax.set_ylim(-2, 102)
        _legend(figure, data)
        return save(figure, folder, "accuracy_over_eps")


def _whole_levels(data: Data) -> bool:
    return all(abs(255 * r["eps"] - round(255 * r["eps"])) < 1e-6 for r in data.values())
