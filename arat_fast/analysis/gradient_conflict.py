"""Do classification and invariance pull the weights the same way? (ARAT paper, gradient conflict)

    g_cls = d(ce_adv + ce_clean)/dw,  g_inv = d(invariance)/dw,  w: the network's Conv2d and Linear weights
    cosine = g_cls . g_inv / (|g_cls| |g_inv|),  share = fraction of coordinates with g_cls * g_inv < 0

Flattened and concatenated, and layer by layer. Coordinates that a term does not reach (the classifier's, for
the invariance term) have gradient 0: they are counted, and never in conflict, as in the authors' analysis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import EMRConfig, TrainConfig, resolved_attack
from arat_fast.errors import UserError
from arat_fast.training.build import build_method

FORMS = ("trained", "naive", "stop-gradient")


@dataclass(frozen=True)
class Conflict:
    """Cosine similarity, None where a gradient is zero; share of coordinates in conflict; their number."""

    cosine: float | None
    share: float
    coordinates: int


@dataclass(frozen=True)
class NetworkConflict:
    """Overall, and by the name of the Conv2d or Linear layer, in the network's order."""

    overall: Conflict
    layers: dict[str, Conflict]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights whose gradients are compared, by layer: Conv2d's and Linear's, no biases, no BatchNorm."""
    return {n: m.weight for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def _compare(cls: Tensor, inv: Tensor) -> Conflict:
    # The sign of the product would underflow: 1e-25 * 1e-25 is 0 in fp32.
    share = int((cls.sign() * inv.sign() < 0).sum()) / cls.numel()
    cls, inv = cls.double(), inv.double()
    norms = float(cls.norm() * inv.norm())
    cosine = float(cls @ inv) / norms if norms > 0 else None
    return Conflict(cosine if cosine is None or math.isfinite(cosine) else None, share, cls.numel())


def gradient_conflict(terms: Mapping[str, Tensor], network: nn.Module) -> NetworkConflict:
    """Conflict between the cross entropies and the invariance term with respect to the network's weights.

    terms: named, weighted scalars with their graph: `invariance`, and those whose names begin with `ce`. The
    graph is kept, `.grad`s are not touched. Raises ValueError where either kind is missing.
    """
    classification = [term for name, term in terms.items() if name.startswith("ce")]
    if not classification or "invariance" not in terms:
        raise ValueError(f"terms are {sorted(terms)}; expected ce… ones and invariance")
    weights = weights_of(network)

    def gradients(value: Tensor) -> list[Tensor]:
        return [
            g.flatten()
            for g in torch.autograd.grad(
                value, list(weights.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
        ]

    cls, inv = gradients(torch.stack(classification).sum()), gradients(terms["invariance"])
    layers = {name: _compare(c, i) for name, c, i in zip(weights, cls, inv, strict=True)}
    return NetworkConflict(_compare(torch.cat(cls), torch.cat(inv)), layers)


def check_invariance(config: TrainConfig) -> None:
    """Raise UserError for a method without an invariance term, or a KL attack, which the reference lacks."""
    if config.method != "arat" or config.arat.invariance == "none":
        without = "invariance none" if config.method == "arat" else f"method {config.method}"
        raise UserError(
            f"gradient conflict is between classification and invariance gradients; a run with {without} has "
            "no invariance term"
        )
    if resolved_attack(config.attack, config.method).loss == "kl":
        raise UserError("gradient conflict is measured under a ce or margin attack; this run's is kl")


def reference_method(
    config: TrainConfig, network: nn.Module, state: Mapping[str, Tensor] | None = None
) -> reference.ARAT:
    """The run's method in plain PyTorch around `network`, with the state of a checkpoint's "method" entry.

    Raises UserError as `check_invariance`, and for a state of another method.
    """
    check_invariance(config)
    # EMR adds a term of its own: the two that are compared are its base's.
    method = build_method(replace(config, emr=EMRConfig()), network)
    assert isinstance(method, reference.ARAT)
    if state is not None:
        load_method(method, state)
    return method.to(next(network.parameters()).device)


def load_method(method: reference.ARAT, state: Mapping[str, Tensor]) -> None:
    """Take over what a run's engine or checkpoint holds of the method, inside EMR or not.

    Raises UserError for the state of another method.
    """
    plain = {name.removeprefix("base."): value for name, value in state.items()}
    own = method.state_dict()
    missing = [name for name in own if name not in plain]
    if missing:
        raise UserError(f"the checkpoint is of another method: it has no {missing[0]}")
    method.load_state_dict({name: plain[name] for name in own})


def in_form(method: reference.ARAT, form: str) -> reference.ARAT:
    """The loss of `method` in another form on the same weights.

    "trained": itself; "naive": symmetric, nothing stopped, no predictor; "stop-gradient": the clean feature
    stopped, behind the predictors where the run has them.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {FORMS}")
    if form == "trained":
        return method
    other = reference.ARAT(
        method.network,
        gamma=method.gamma,
        invariance="symmetric" if form == "naive" else "stopgrad",
        use_predictor=False,
        auto_balance=method.auto_balance,
        distance=method.distance,
        temperature=method.temperature,
        layers=method.layers,
    )
    if form == "stop-gradient":
        other.predictors = method.predictors
    other.a = method.a
    return other


@contextmanager
def _undisturbed(method: reference.ARAT) -> Iterator[None]:
    """Train mode inside; modes, branches, running statistics and predictors' statistics put back."""
    with reference.attack_mode(method, "adv", batch_statistics=True, update_statistics=False):
        yield


def measure_conflict(
    method: reference.ARAT, images: Tensor, x_adv: Tensor, labels: Tensor, forms: Sequence[str] = ("trained",)
) -> dict[str, NetworkConflict]:
    """Conflict of the method's loss, in each form, on one batch in train mode; nothing of it is changed."""
    result = {}
    for form in forms:
        chosen = in_form(method, form)
        with _undisturbed(chosen), torch.enable_grad():
            terms, _ = chosen.loss(images, x_adv, labels)
            result[form] = gradient_conflict(terms, chosen.network)
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _deviation(values: Iterable[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return float(torch.tensor(present, dtype=torch.float64).std()) if len(present) > 1 else None


def summarise(measured: Sequence[NetworkConflict]) -> dict[str, Any]:
    """Means over batches, overall with standard deviation, as plain values."""

    def means(conflicts: Sequence[Conflict]) -> dict[str, Any]:
        return {
            "cosine": _mean(c.cosine for c in conflicts),
            "share": _mean(c.share for c in conflicts),
            "coordinates": conflicts[0].coordinates,
        }

    overall = [m.overall for m in measured]
    spread = {
        "cosine_std": _deviation(c.cosine for c in overall),
        "share_std": _deviation(c.share for c in overall),
    }
    layers = {name: means([m.layers[name] for m in measured]) for name in measured[0].layers}
    return {"batches": len(measured), "overall": means(overall) | spread, "layers": layers}
