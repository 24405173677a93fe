"""Pictures for a paper: one column wide, vector PDF and PNG, told apart without colour."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arat_fast.errors import TrainingError, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.4  # inches, a column of a two-column page
HEIGHT = 2.3
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "errorbar.capsize": 1.5,
    "hatch.linewidth": 0.5,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.fonttype": "none",
    "savefig.dpi": 300,
}


class Series(NamedTuple):
    """How one series is drawn: colour of a luminance of its own, line style and marker."""

    color: str
    linestyle: Any
    marker: str


_SERIES = (
    Series("#000000", "-", "o"),
    Series("#0072b2", (0, (4, 1.5)), "s"),
    Series("#d55e00", (0, (1, 1.2)), "^"),
    Series("#8c8c8c", (0, (5, 1.2, 1, 1.2)), "D"),
    Series("#009e73", (0, (7, 2)), "v"),
    Series("#b0609a", (0, (3, 1.2, 1, 1.2, 1, 1.2)), "P"),
    Series("#56b4e9", "-", "X"),
    Series("#c8a000", (0, (2, 2)), "<"),
)


def series(index: int) -> Series:
    """The look of series number `index`; it repeats after eight."""
    return _SERIES[index % len(_SERIES)]


def need_matplotlib() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "pictures need matplotlib: pip install 'arat-fast[plots]', or leave them out with --no-pictures"
        ) from None


@contextmanager
def axes(rows: int = 1, width: float = COLUMN, height: float = HEIGHT) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the house style with `rows` axes above one another that share their x axis.

    No window system is touched, and no setting of matplotlib outlives the block.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name in ("matplotlib", "fontTools"):  # they report every glyph of a PDF, and warn of its fonts' dates
        logging.getLogger(name).setLevel(logging.ERROR)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.pdf and NAME.png; the same data give the same bytes. Raises TrainingError when the disk
    refuses.
    """
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    try:
        figure.savefig(paths[0], metadata={"CreationDate": None})
        figure.savefig(paths[1], metadata={"Software": None})
    except OSError as error:
        raise TrainingError(
            f"cannot write {paths[0]}: {error.strerror}; make room or give another --out"
        ) from error
    return paths


def layer_axis(ax: Axes, names: Sequence[str]) -> None:
    """Layers by name along x, in the network's order."""
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7 if len(names) <= 24 else 5)
    ax.set_xlim(-0.5, len(names) - 0.5)
