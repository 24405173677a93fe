"""ARAT's loss on given logits and features, in every form, against plain floats."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from arat_fast.config import ARATConfig
from arat_fast.methods import ARAT, Outputs

Rows = list[list[float]]
LABELS = [1, 0, 2]
LAYERS = ("one", "two")
# Whose features the invariance gradient reaches: (clean, adversarial).
REACHES = {
    "stopgrad": (False, True),
    "symmetric": (True, True),
    "target-only": (True, False),
    "two-sided": (True, True),
}


def random(seed: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, width, generator=generator, dtype=torch.float64).requires_grad_()


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def plain_distance(prediction: Rows, target: Rows, kind: str, temperature: float) -> float:
    total = 0.0
    for p, t in zip(prediction, target, strict=True):
        if kind == "cosine":
            dot = sum(a * b for a, b in zip(p, t, strict=True))
            total += 1 - dot / math.hypot(*p) / math.hypot(*t)
        elif kind == "mse":
            total += sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p)
        else:
            pairs = zip(softmax(t, temperature), softmax(p, temperature), strict=True)
            total += temperature**2 * sum(b * math.log(b / a) for b, a in pairs)
    return total / len(prediction)


@pytest.mark.parametrize("form", [*REACHES, "none"])
@pytest.mark.parametrize(
    ("distance", "temperature"), [("cosine", 1.0), ("mse", 1.0), ("kl", 1.0), ("kl", 2.5)]
)
def test_terms_and_where_gradients_go(form: str, distance: str, temperature: float) -> None:
    config = ARATConfig(
        gamma=7.0,
        invariance=form,  # type: ignore[arg-type]
        distance=distance,  # type: ignore[arg-type]
        temperature=temperature,
        predictor=False,
    )
    method = ARAT(config, dict.fromkeys(LAYERS, 4))
    method.a.fill_(0.25)
    clean, adv = random(0, 5), random(1, 5)
    taps_clean, taps_adv = ({name: random(k + s, 4) for k, name in enumerate(LAYERS)} for s in (2, 4))
    terms = method.loss(
        Outputs(clean=clean, adv=adv, taps_clean=taps_clean, taps_adv=taps_adv), torch.tensor(LABELS)
    )

    for name, logits, weight in (("ce_adv", adv, 0.25), ("ce_clean", clean, 0.75)):
        right = [-math.log(softmax(row, 1.0)[y]) for row, y in zip(logits.tolist(), LABELS, strict=True)]
        assert float(terms[name]) == pytest.approx(weight * sum(right) / 3, rel=1e-12)
    if form == "none":
        assert set(terms) == {"ce_adv", "ce_clean"}
        return
    each = []
    for name in LAYERS:
        one, other = taps_adv[name].tolist(), taps_clean[name].tolist()
        each.append(plain_distance(one, other, distance, temperature))
        if form == "two-sided":
            each[-1] = (each[-1] + plain_distance(other, one, distance, temperature)) / 2
    assert float(terms["invariance"]) == pytest.approx(7 * sum(each) / 2, rel=1e-12)
    taps = [*taps_clean.values(), *taps_adv.values()]
    gradients = torch.autograd.grad(terms["invariance"], taps, allow_unused=True)
    reached = [g is not None and bool(g.any()) for g in gradients]
    assert reached == [REACHES[form][0]] * 2 + [REACHES[form][1]] * 2


def test_every_form_is_above() -> None:
    forms = get_args(get_type_hints(ARATConfig)["invariance"])
    assert set(forms) == {*REACHES, "none"}


def test_without_auto_balance_both_cross_entropies_weigh_one() -> None:
    clean, adv = random(0, 5), random(1, 5)
    weighed = [
        ARAT(ARATConfig(invariance="none", auto_balance=balance), {}).loss(
            Outputs(clean=clean, adv=adv), torch.tensor(LABELS)
        )
        for balance in (False, True)
    ]
    for name in ("ce_adv", "ce_clean"):
        torch.testing.assert_close(weighed[0][name], 2 * weighed[1][name])  # a is 0.5 at first
