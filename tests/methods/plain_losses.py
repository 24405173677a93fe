"""Every loss in plain Python floats, an image at a time: what the methods are tested against.

Logits are lists of lists; each function gives the whole loss. MAIL's take the weights as given, because they
are constants of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Logits = Sequence[Sequence[float]]
Loss = Callable[[Logits, Logits], float]


def softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def log_softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def cross_entropy(z: Sequence[float], y: int) -> float:
    return -log_softmax(z)[y]


def divergence(clean: Sequence[float], adv: Sequence[float]) -> float:
    """KL(p(x) ‖ p(x'))."""
    p, log_p, log_q = softmax(clean), log_softmax(clean), log_softmax(adv)
    return sum(a * (b - c) for a, b, c in zip(p, log_p, log_q, strict=True))


def best_wrong(p: Sequence[float], y: int) -> float:
    return max(v for k, v in enumerate(p) if k != y)


def boosted(adv: Sequence[float], y: int) -> float:
    return cross_entropy(adv, y) - math.log(1.0001 - best_wrong(softmax(adv), y) + 1e-12)


def weighted(clean: Sequence[float], adv: Sequence[float], y: int) -> float:
    p, log_p, q = softmax(clean), log_softmax(clean), softmax(adv)
    total = sum(a * (b - math.log(c + 1e-12)) for a, b, c in zip(p, log_p, q, strict=True))
    return (1.0000001 - p[y]) * total


def mail_weight(adv: Sequence[float], y: int, slope: float, bias: float) -> float:
    p = softmax(adv)
    return 3 / (1 + math.exp(-slope * (best_wrong(p, y) - p[y] + bias)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def of_at(labels: Sequence[int]) -> Loss:
    return lambda _, adv: mean([cross_entropy(b, y) for b, y in zip(adv, labels, strict=True)])


def of_trades(labels: Sequence[int], beta: float, weights: Sequence[float] | None = None) -> Loss:
    w = weights or [1.0] * len(labels)

    def loss(clean: Logits, adv: Logits) -> float:
        natural = mean([cross_entropy(a, y) for a, y in zip(clean, labels, strict=True)])
        return natural + beta * mean([k * divergence(a, b) for k, a, b in zip(w, clean, adv, strict=True)])

    return loss


def of_mart(labels: Sequence[int], beta: float, weights: Sequence[float] | None = None) -> Loss:
    w = weights or [1.0] * len(labels)

    def loss(clean: Logits, adv: Logits) -> float:
        rows = list(zip(w, clean, adv, labels, strict=True))
        return mean([k * boosted(b, y) for k, _, b, y in rows]) + beta * mean(
            [weighted(a, b, y) for _, a, b, y in rows]
        )

    return loss


def of_mail_at(labels: Sequence[int], weights: Sequence[float]) -> Loss:
    return lambda _, adv: mean(
        [w * cross_entropy(b, y) for w, b, y in zip(weights, adv, labels, strict=True)]
    )


def gradient(loss: Loss, clean: Logits, adv: Logits) -> tuple[list[list[float]], list[list[float]]]:
    """By central differences, in both logits."""
    h = 1e-6
    both = [[list(row) for row in clean], [list(row) for row in adv]]
    gradients: list[list[list[float]]] = [[], []]
    for which, rows in enumerate(both):
        for row in rows:
            of_row = []
            for k, value in enumerate(row):
                row[k] = value + h
                above = loss(both[0], both[1])
                row[k] = value - h
                below = loss(both[0], both[1])
                row[k] = value
                of_row.append((above - below) / (2 * h))
            gradients[which].append(of_row)
    return gradients[0], gradients[1]
