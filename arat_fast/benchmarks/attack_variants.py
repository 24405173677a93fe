"""The variants of `arat-fast bench attack`: the same PGD by eager PyTorch, torchattacks and this project."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_fast import reference
from arat_fast.attacks import PGD
from arat_fast.benchmarks.step_variants import HALVES, Setting
from arat_fast.config import AttackConfig, resolved_attack
from arat_fast.errors import TrainingError, unknown_name
from arat_fast.models import create_model
from arat_fast.nn import from_authors
from arat_fast.training.attack_pass import AttackPass
from arat_fast.training.capture import CapturedIteration, CudaGraph
from arat_fast.training.precision import DTYPES, LowPrecisionTwin, resolve_precision

Attack = Callable[[Tensor, Tensor], Tensor]

EPS, ALPHA = 8 / 255, 2 / 255
BATCH = "eager-batch"
REACHED = 0.02  # of the loss: two random starts of the same attack differ by less


@dataclass(frozen=True)
class Networks:
    """The same weights and statistics, as the reference and as the fast path's model."""

    plain: torch.nn.Module
    fast: torch.nn.Module


def networks(setting: Setting, device: torch.device, images: Tensor) -> Networks:
    """Freshly drawn weights; running statistics of `images`, so that the running mode is a real one."""
    torch.manual_seed(0)
    plain = reference.MODELS[setting.model](10, 3).to(device)
    with torch.no_grad():
        for branch in reference.BRANCHES:
            reference.use_branch(plain, branch)
            for _ in range(10):
                plain(images)
    fast = create_model(setting.model)
    fast.load_state_dict(from_authors(plain.state_dict()))
    return Networks(plain.eval(), fast.to(device).eval())


def attack_names(setting: Setting, device: torch.device, chosen: str = "") -> list[str]:
    """Variants that differ here, or the comma-separated `chosen` ones with their baselines."""
    low = resolve_precision(setting.precision, device) in HALVES
    names = ["eager", "ours", "fast-folded", BATCH, "ours-batch", "fast-batch", "ours-plain"]
    names += ["torchattacks"] if importlib.util.find_spec("torchattacks") is not None else []
    names += ["ours-bf16"] if low else []
    names += ["ours-compiled"] if setting.compiled(device) else []
    if not chosen:
        return names
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in wanted:
        if name not in names:
            raise unknown_name("variant", name, names)
    kept = {*wanted, *(attack_baseline(name) for name in wanted)}
    return [name for name in names if name in kept]


def attack_baseline(variant: str) -> str:
    """Attacks on batch statistics are compared with eager's on batch statistics."""
    return BATCH if variant.endswith("-batch") else "eager"


def attack_element(variant: str, setting: Setting, device: torch.device) -> int:
    """Bytes of an activation's element."""
    low = resolve_precision(setting.precision, device) in HALVES
    return 2 if low and (variant.startswith("fast") or variant == "ours-bf16") else 4


def build_attack(setting: Setting, device: torch.device, variant: str, networks: Networks) -> Attack:
    """`x_adv = attack(images, labels)`: PGD of `setting.steps` steps from a random start, adv branch."""
    steps = setting.steps
    if variant in ("eager", BATCH):
        return _eager(networks.plain, steps, variant == BATCH)
    if variant == "torchattacks":
        torchattacks: Any = importlib.import_module("torchattacks")
        peer: Attack = torchattacks.PGD(networks.plain, eps=EPS, alpha=ALPHA, steps=steps, random_start=True)
        return peer
    if variant == "ours-plain":
        return PGD(networks.plain, EPS, ALPHA, steps, seed=0)
    if variant == "ours-batch":
        return PGD(networks.fast, EPS, ALPHA, steps, bn="batch", update_statistics=True, branch="adv", seed=0)
    if variant.startswith("ours"):
        return PGD(
            networks.fast,
            EPS,
            ALPHA,
            steps,
            branch="adv",
            precision="bf16" if variant == "ours-bf16" else None,
            compile=variant == "ours-compiled",
            seed=0,
        )
    return Training(networks.fast, setting, device, "batch" if variant == "fast-batch" else "running")


def _eager(network: torch.nn.Module, steps: int, batch_statistics: bool) -> Attack:
    def attack(images: Tensor, labels: Tensor) -> Tensor:
        start = reference.random_start(images, EPS, "Linf", None)
        return reference.pgd(
            network, images, labels, steps=steps, start=start, batch_statistics=batch_statistics
        )

    return attack


class Training:
    """The attack of `TrainStep` by itself: low precision, compiled, and on a GPU one captured graph."""

    def __init__(self, model: torch.nn.Module, setting: Setting, device: torch.device, bn: str) -> None:
        dtype = DTYPES[resolve_precision(setting.precision, device)]
        settings = resolved_attack(AttackConfig(steps=setting.steps, bn=bn), "arat")  # type: ignore[arg-type]
        self.model, self.twin = model.train(), LowPrecisionTwin(model, dtype)
        self.seed, self.offset = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.attack = AttackPass(model, self.twin, settings, dtype=dtype, seed=self.seed, offset=self.offset)
        self.compiled = setting.compiled(device)
        if self.compiled:
            self.attack.compile()
        self.on_gpu = device.type == "cuda"
        self.captured: CapturedIteration | None = None

    def _run(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.twin.refresh()
        _, x_adv = self.attack(images, labels, self.compiled)
        self.offset.add_(1)
        return {"x_adv": x_adv}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images; on a GPU valid until the next call."""
        images = images.contiguous(memory_format=torch.channels_last)
        if not self.on_gpu:
            return self._run(images, labels)["x_adv"]
        if self.captured is None:
            self.captured = CapturedIteration(
                self._run,
                (images, labels),
                (False, False),
                lambda: [*self.model.buffers(), self.offset],
                CudaGraph(),
            )
        return self.captured((images, labels))["x_adv"]


def reached(network: torch.nn.Module, x_adv: Tensor, labels: Tensor, batch_statistics: bool) -> float:
    """The reference network's cross entropy on adversarial images; its statistics are left alone."""
    with torch.no_grad(), reference.attack_mode(network, "adv", batch_statistics, update_statistics=False):
        return float(F.cross_entropy(network(x_adv.contiguous()), labels))


def check_attacks(
    attacks: Mapping[str, Attack], networks: Mapping[str, Networks], images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Assert ball, range and strength of every attack; returns the loss each reached.

    networks: by baseline. Strength: a cross entropy above the clean images' and within 2 % of the eager
    attack's, by the reference network. Raises TrainingError.
    """
    losses: dict[str, float] = {}
    for name, attack in attacks.items():
        x_adv = attack(images, labels).clone()
        distance = float((x_adv - images).abs().max())
        if not (distance <= EPS + 1e-6 and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):
            raise TrainingError(f"attack {name} leaves the ball or the range: {distance * 255:.4f}/255 away")
        base = attack_baseline(name)
        losses[name], clean = (
            reached(networks[base].plain, x, labels, base == BATCH) for x in (x_adv, images)
        )
        expected = losses[base]
        if not (losses[name] > clean and abs(losses[name] - expected) <= REACHED * expected):
            raise TrainingError(
                f"attack {name} reaches the loss {losses[name]:.5g}; {base} {expected:.5g}, clean images "
                f"{clean:.5g}"
            )
    return losses
