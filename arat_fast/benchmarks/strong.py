"""The strong baseline: the reference's iteration as a skilled user speeds it up in an afternoon.

Half precision by autocast where bf16 is fast, channels-last, fused SGD, an attack of input
gradients only. Compiled: torch.compile on the network, and the parameters frozen during the attack, since a
compiled graph would otherwise compute their gradients there and throw them away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.config import AttackConfig

Forward = Callable[[Tensor], Tensor]


class Taps:
    """Permanent hooks that collect the pooled features of the invariance layers while `on`.

    The reference hangs up its hooks anew in every forward, which no compiled graph survives.
    """

    def __init__(self, network: nn.Module, layers: tuple[str, ...]) -> None:
        self.on = False
        self.features: dict[str, Tensor] = {}
        for name in layers:
            network.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def record(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            if self.on:
                self.features[name] = F.relu(output).mean((2, 3))

        return record


class StrongIteration:
    """`metrics = iterate(images, labels)`: the reference's loss and attack on a network that is made fast.

    Args:
        method: `reference.ARAT` on the device; its network becomes channels-last.
        attack: resolved settings.
        half: autocast's dtype, or None for fp32.
        compiled: torch.compile the network.
        plain: leave out what takes knowledge, channels-last and frozen parameters.
    """

    def __init__(
        self,
        method: reference.ARAT,
        attack: AttackConfig,
        half: torch.dtype | None,
        *,
        compiled: bool,
        plain: bool = False,
    ) -> None:
        self.layout = torch.contiguous_format if plain else torch.channels_last
        method.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.method, self.attack, self.half = method, attack, half
        self.frozen = list(method.network.parameters()) if compiled and not plain else []
        self.optimizer = torch.optim.SGD(
            method.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.taps = Taps(method.network, method.layers)
        self.forward: Forward = torch.compile(method.network, dynamic=False) if compiled else method.network

    def __call__(self, images: Tensor, labels: Tensor, x_adv: Tensor | None = None) -> dict[str, Tensor]:
        """One iteration; `x_adv` replaces the attack."""
        images = images.contiguous(memory_format=self.layout)
        context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.half is not None:
            context = torch.autocast(images.device.type, self.half)
        with context:
            self.method.train()
            x_adv = self.perturb(images, labels) if x_adv is None else x_adv
            x_adv = x_adv.contiguous(memory_format=self.layout)
            terms, logits = self._loss(images, x_adv, labels)
            total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        metrics = {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}
        for name, values in logits.items():
            metrics[f"accuracy_{name}"] = (values.detach().argmax(1) == labels).float().mean()
        return metrics

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """PGD, as the reference's. Parameters are frozen where the network is compiled."""
        network, attack = self.method.network, self.attack
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        start = reference.random_start(images, attack.eps, attack.norm, None)
        x_adv = (images + start).clamp(0, 1)
        with reference.attack_mode(network, "adv", attack.bn == "batch"):
            for _ in range(attack.steps):
                x_adv.requires_grad_()
                loss = F.cross_entropy(self.forward(x_adv), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x_adv)
                moved = x_adv.detach() + attack.alpha * gradient.sign()
                x_adv = (images + (moved - images).clamp(-attack.eps, attack.eps)).clamp(0, 1)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return x_adv

    def _features(self, images: Tensor, branch: str) -> tuple[Tensor, dict[str, Tensor]]:
        reference.use_branch(self.method.network, branch)
        self.taps.on, self.taps.features = True, {}
        logits = self.forward(images)
        self.taps.on = False
        return logits, self.taps.features

    def _loss(
        self, images: Tensor, x_adv: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        method = self.method
        logits_clean, clean = self._features(images, "clean")
        logits_adv, adv = self._features(x_adv, "adv")
        terms = {
            "ce_adv": method.a * F.cross_entropy(logits_adv, labels),
            "ce_clean": (1 - method.a) * F.cross_entropy(logits_clean, labels),
        }
        each = [
            1 - F.cosine_similarity(h(adv[name]).float(), clean[name].detach().float(), dim=1).mean()
            for name, h in zip(method.layers, method.predictors, strict=True)
        ]
        terms["invariance"] = method.gamma * torch.stack(each).mean()
        return terms, {"clean": logits_clean, "adv": logits_adv}
