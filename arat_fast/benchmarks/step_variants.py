"""The variants of `arat-fast bench step`: which there are on a device, how each is built, that all agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arat_fast import methods, reference
from arat_fast.benchmarks.conditions import float32_products
from arat_fast.benchmarks.strong import StrongIteration
from arat_fast.config import ARATConfig, AttackConfig, resolved_attack
from arat_fast.errors import TrainingError, unknown_name
from arat_fast.models import create_model
from arat_fast.nn import from_authors
from arat_fast.nn.bf16 import has_bf16_matrix_units
from arat_fast.training.precision import Precision, resolve_precision
from arat_fast.training.step import TrainStep

Iteration = Callable[..., dict[str, Tensor]]
Switch = Literal["auto", "on", "off"]

RUNNING = "eager-running"
# A running-statistics attack is another attack: its variants are compared among themselves.
BASELINES = {RUNNING: RUNNING, "fast-folded": RUNNING}
PLAIN = "eager-compiled"  # only where asked for: it compiles as long as strong-compiled, and is no rival
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What every variant shares."""

    model: str
    batch: int
    side: int
    steps: int
    precision: Precision = "auto"
    compile: Switch = "auto"

    def compiled(self, device: torch.device) -> bool:
        """Whether compiled variants are compiled: as asked, or where the trainer compiles."""
        if self.compile == "auto":
            return device.type == "cuda" or has_bf16_matrix_units(device)
        return self.compile == "on"


def baseline(variant: str) -> str:
    """The variant that `variant` is compared with."""
    return BASELINES.get(variant, "eager")


def variant_names(setting: Setting, device: torch.device, chosen: str = "") -> list[str]:
    """All variants that differ here; or the comma-separated `chosen` ones, with their baselines.

    The most telling first: a benchmark short of time leaves out the last. Raises UserError for an unknown
    name, or one that is the same as another here.
    """
    compiled = setting.compiled(device)
    low = resolve_precision(setting.precision, device) in HALVES
    names = ["eager", "fast", "strong"]
    names += ["strong-compiled"] if compiled else []
    names += [RUNNING, "fast-folded"]
    names += ["fast-no-capture"] if device.type == "cuda" else []
    names += ["fast-no-compile", "fast-no-join"] if compiled else []
    names += ["fast-no-bf16"] if low else []
    names += ["fast-guarded"]
    if not chosen:
        return names
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    names.append(PLAIN)
    for name in wanted:
        if name not in names:
            raise unknown_name("variant", name, names)
    kept = {*wanted, *(baseline(name) for name in wanted)}
    return [name for name in names if name in kept]


def is_compiled(variant: str, setting: Setting, device: torch.device) -> bool:
    """Whether the variant goes through torch.compile."""
    if variant in ("strong-compiled", PLAIN):
        return True
    return variant.startswith("fast") and variant != "fast-no-compile" and setting.compiled(device)


def element_bytes(variant: str, setting: Setting, device: torch.device) -> int:
    """Bytes of an activation's element."""
    low = resolve_precision(setting.precision, device) in HALVES
    return 2 if low and variant.startswith(("fast", "strong")) and variant != "fast-no-bf16" else 4


def attack_of(setting: Setting, variant: str) -> AttackConfig:
    """The attack that the variant trains against."""
    running = variant in BASELINES
    return resolved_attack(AttackConfig(steps=setting.steps, bn="running" if running else "batch"), "arat")


def _method(setting: Setting, device: torch.device) -> reference.ARAT:
    torch.manual_seed(0)
    network = reference.MODELS[setting.model](10, 3)
    torch.manual_seed(1)
    return reference.ARAT(network).to(device)


def _eager(setting: Setting, device: torch.device, variant: str) -> Iteration:
    method = _method(setting, device)
    attack = attack_of(setting, variant)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def iterate(images: Tensor, labels: Tensor, x_adv: Tensor | None = None) -> dict[str, Tensor]:
        return reference.train_step(
            method,
            optimizer,
            images,
            labels,
            steps=attack.steps,
            batch_statistics=attack.bn == "batch",
            x_adv=x_adv,
        )

    return iterate


def _strong(setting: Setting, device: torch.device, variant: str) -> Iteration:
    precision = resolve_precision(setting.precision, device)
    # Without a loss scaler fp16 is no baseline: on such GPUs the strong one stays in float32.
    half = torch.bfloat16 if precision == "bf16" and variant.startswith("strong") else None
    return StrongIteration(
        _method(setting, device),
        attack_of(setting, variant),
        half,
        compiled=variant.endswith("-compiled"),
        plain=variant == PLAIN,
    )


def _fast(setting: Setting, device: torch.device, variant: str) -> Iteration:
    start = _method(setting, torch.device("cpu"))
    model = create_model(setting.model)
    model.load_state_dict(from_authors(start.network.state_dict()))
    layers: Sequence[str] = getattr(model, "invariance_layers")  # noqa: B009
    dims = {name: int(getattr(model.get_submodule(name), "num_features")) for name in layers}  # noqa: B009
    method = methods.ARAT(ARATConfig(), dims)
    for ours, theirs in zip(method.predictors, start.predictors, strict=True):
        ours.load_state_dict(theirs.state_dict())
    model.to(device)
    method.to(device)
    parameters = [*model.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    return TrainStep(
        model,
        method,
        optimizer,
        attack=attack_of(setting, variant),
        precision="fp32" if variant == "fast-no-bf16" else setting.precision,
        compiled=is_compiled(variant, setting, device),
        joined=variant != "fast-no-join",
        capture=variant != "fast-no-capture",
        guard=variant == "fast-guarded",
    )


def build(setting: Setting, device: torch.device, variant: str) -> Iteration:
    """`metrics = iterate(images, labels, x_adv=None)`; all variants start from the same weights."""
    if variant.startswith("fast"):
        return _fast(setting, device, variant)
    if variant.startswith("strong") or variant == PLAIN:
        return _strong(setting, device, variant)
    return _eager(setting, device, variant)


def data(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, side, side) in [0, 1] and labels, on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(setting.batch, 3, setting.side, setting.side, generator=generator)
    return images.to(device), (torch.arange(setting.batch) % 10).to(device)


def tolerance(variant: str, setting: Setting, device: torch.device) -> float:
    """Relative error of the loss terms that rounding explains: fp32, TF32's 11 bits, bf16's 8."""
    if element_bytes(variant, setting, device) == 2:
        return 3e-2
    return 5e-3 if float32_products(device) == "tf32" else 1e-4


ATTACK_TOLERANCE = 0.05  # of the loss reached: PGD from another start ends within 1 % on 8 tiny images


@dataclass(frozen=True)
class Observed:
    """Metrics of a variant's first iteration, on given adversarial images, and of the second, on its own."""

    given: dict[str, float]
    attacked: dict[str, float]


def observe(iterate: Iteration, images: Tensor, labels: Tensor) -> Observed:
    """The first two iterations of a variant as it was built."""
    wave = torch.sin(2.17 * torch.arange(images.numel(), device=images.device)).view_as(images)
    x_adv = (images + 8 / 255 * wave).clamp(0, 1)
    given = _values(iterate(images, labels, x_adv=x_adv))
    return Observed(given, _values(iterate(images, labels)))


def check_agreement(observed: Mapping[str, Observed], setting: Setting, device: torch.device) -> None:
    """Assert that all variants computed the same iterations.

    On given adversarial images every loss term within `tolerance`; the loss that each one's own attack
    reached within 5 %. Raises TrainingError with the variant, the term and both values.
    """
    for name, ours in observed.items():
        base = observed[baseline(name)]
        for term, value in base.given.items():
            if not term.startswith("accuracy"):
                _compare(name, term, ours.given[term], value, tolerance(name, setting, device))
        reached = "ce_adv"
        _compare(name, "ce_adv, attacked", ours.attacked[reached], base.attacked[reached], ATTACK_TOLERANCE)


def _values(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _compare(variant: str, term: str, ours: float, theirs: float, allowed: float) -> None:
    error = abs(ours - theirs) / max(abs(theirs), 1e-6)
    if not error <= allowed:
        raise TrainingError(
            f"variant {variant}: {term} is {ours:.6g}, {baseline(variant)}'s {theirs:.6g} (relative "
            f"{error:.1e}, allowed {allowed:.0e})"
        )
