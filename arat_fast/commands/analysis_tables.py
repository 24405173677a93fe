"""Tables of analysed runs for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from arat_fast.analysis.labels import form_label, short_names
from arat_fast.analysis.margin import QUANTILES
from arat_fast.commands.table import format_table
from arat_fast.pixels import format_pixels

Results = Sequence[Mapping[str, Any]]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _figure(figure: Mapping[str, Any]) -> str:
    return f"{100 * figure['accuracy']:.1f} ± {100 * figure['error_95']:.1f} %"


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _reached_share(conflict: Mapping[str, Any]) -> str:
    """A layer's share; "-" where one of the gradients is zero."""
    return "-" if conflict["cosine"] is None else _percent(conflict["share"])


def _conflict_table(results: Results) -> str:
    rows = []
    for name, result in zip(short_names([r["run"] for r in results]), results, strict=True):
        for form, summary in result["conflict"]["forms"].items():
            overall = summary["overall"]
            cosine, share = _number(overall["cosine"]), _percent(overall["share"])
            if overall["share_std"] is not None:
                share += f" ± {100 * overall['share_std']:.1f}"
            rows.append([name, form_label(result["conflict"], form), cosine, share])
    note = "share of the weights that both gradients pull apart; ± standard deviation over batches"
    text = format_table(["gradient conflict", "invariance loss", "cosine", "conflicting"], rows) + "\n" + note
    if len(results) > 1:
        return text
    forms = results[0]["conflict"]["forms"]
    layers = [
        [name, *(_reached_share(summary["layers"][name]) for summary in forms.values())]
        for name in forms["trained"]["layers"]
    ]
    header = ["by layer", *(form_label(results[0]["conflict"], form) for form in forms)]
    return text + "\n\n" + format_table(header, layers)


def _mixture_row(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    def divergence(kind: str) -> str:
        return _number(_mean([(v["divergence"][kind] or {}).get("mean") for v in layers]))

    return [
        _number(_mean([v["distance"] for v in layers])),
        _percent(_mean([v["relative"] for v in layers])),
        *(divergence(kind) for kind in ("running", "measured", "through_adv")),
    ]


def _mixture_table(results: Results) -> str:
    header = ["|z' - z|", "relative", "J running", "J measured", "J through adv", "Var clean", "Var adv"]

    def variances(mixture: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        values = mixture["variance"]
        return [
            _number(_mean([values[b][n] for n in names]) if b in values else None) for b in ("clean", "adv")
        ]

    if len(results) == 1:
        mixture = results[0]["mixture"]
        rows = [[n, *_mixture_row([v]), *variances(mixture, [n])] for n, v in mixture["layers"].items()]
        first = "layer"
    else:
        rows = [
            [
                n,
                *_mixture_row(list(r["mixture"]["layers"].values())),
                *variances(r["mixture"], list(r["mixture"]["layers"])),
            ]
            for n, r in zip(short_names([r["run"] for r in results]), results, strict=True)
        ]
        first = "mean over layers"
    note = (
        "J: symmetric KL of clean and adversarial statistics in nats, of the running ones and as measured; "
        "Var: of the running means over epochs"
    )
    return format_table([first, *header], rows) + "\n" + note


def _margin_table(results: Results) -> str:
    rows = []
    for name, result in zip(short_names([r["run"] for r in results]), results, strict=True):
        margin = result["margin"]
        quantiles = [_number(margin["quantiles"][f"{q:g}"]) for q in QUANTILES]
        rows.append([name, _percent(margin["share_not_positive"]), _number(margin["mean"]), *quantiles])
    header = ["effective margin", "at most 0", "mean", *(f"{100 * q:g} %" for q in QUANTILES)]
    counts = sorted({result["margin"]["n"] for result in results})
    note = f"L2, pixel range 1; n = {', '.join(f'{n:,}' for n in counts)} test images"
    return format_table(header, rows) + "\n" + note


def _tradeoff_table(results: Results) -> str:
    rows = []
    for name, result in zip(short_names([r["run"] for r in results]), results, strict=True):
        both = result["tradeoff"]
        attack = f"PGD-{both['robust']['steps']}, {both['norm']} {format_pixels(both['robust']['eps'])}"
        rows.append(
            [
                name,
                result["label"],
                _figure(both["clean"]),
                _figure(both["robust"]),
                f"{100 * both['sum']:.1f}",
                attack,
            ]
        )
    return format_table(["trade-off", "what", "clean", "robust", "sum", "attack"], rows)


def _epsilons_table(results: Results) -> str:
    radii = sorted({p["eps"] for r in results for p in r["epsilons"]["points"]})
    rows = []
    for name, result in zip(short_names([r["run"] for r in results]), results, strict=True):
        by_eps = {p["eps"]: p for p in result["epsilons"]["points"]}
        rows.append([name, *(_percent(by_eps[e]["accuracy"]) if e in by_eps else "-" for e in radii)])
    return format_table(["accuracy over eps", *(_radius(eps) for eps in radii)], rows)


def _radius(eps: float) -> str:
    exact = format_pixels(eps)
    return "clean" if eps == 0 else exact if len(exact) <= 8 else f"{eps:.4g}"


_TABLES: dict[str, Callable[[Results], str]] = {
    "conflict": _conflict_table,
    "mixture": _mixture_table,
    "margin": _margin_table,
    "tradeoff": _tradeoff_table,
    "epsilons": _epsilons_table,
}


def table(name: str, results: Results) -> str:
    """The analysis of the runs as a table for the terminal; of one run, layer by layer."""
    return _TABLES[name](results)
