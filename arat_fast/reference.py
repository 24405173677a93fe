"""ARAT in plain eager PyTorch: the executable specification of this project.

Asymmetrically representation-regularised adversarial training (Waseda, Chang, Echizen, ICLR 2025), written to
be read in one sitting and shared with nothing: every fast path is tested against this file, and benchmarks
call it "eager". One iteration on a batch (x, y), images in [0, 1]:

1. x' = PGD(x, y) against the adversarial BatchNorm branch, batch statistics.
2. z, c  = features and logits of x  through the *clean* branch;
   z', c' = features and logits of x' through the *adv* branch; convolutions and classifier are shared.
3. L = a CE(c', y) + (1 - a) CE(c, y) + gamma / |S| * sum over l in S of Dist(h_l(z'_l), stop-gradient(z_l)).

h_l is a predictor MLP, Dist one minus the mean cosine similarity, a the clean branch's accuracy
("auto-balance"). A tapped layer l is named by its BatchNorm; its feature is the average-pooled ReLU of that
BatchNorm's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCHES = ("clean", "adv")


class SplitBatchNorm2d(nn.Module):
    """Two independent BatchNorms, `clean` and `adv`: affine parameters and running statistics each.

    `branch` says which one the next forward uses; `adv` is the inference branch of ARAT.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.clean = nn.BatchNorm2d(num_features)
        self.adv = nn.BatchNorm2d(num_features)
        self.branch = "adv"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, H, W) by the chosen branch."""
        return self.clean(x) if self.branch == "clean" else self.adv(x)


def use_branch(model: nn.Module, branch: str) -> None:
    """Choose the branch of every split BatchNorm; a model with single BatchNorms has nothing to choose."""
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}; expected one of {BRANCHES}")
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.branch = branch


def _batch_norm(channels: int, split_bn: bool) -> nn.Module:
    return SplitBatchNorm2d(channels) if split_bn else nn.BatchNorm2d(channels)


class BasicBlock(nn.Module):
    """Post-activation residual block: 3x3 - BN - ReLU - 3x3 - BN, add, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, split_bn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = _batch_norm(channels, split_bn)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = _batch_norm(channels, split_bn)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_bn = _batch_norm(channels, split_bn)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        residual = x if self.shortcut is None else self.shortcut_bn(self.shortcut(x))
        return F.relu(out + residual)


class ResNet(nn.Module):
    """CIFAR residual network: 3x3 stem, no max-pool, groups of basic blocks, each group after the first
    `full_size` ones of stride 2.

    `invariance_layers` names the taps of the paper's loss: the BatchNorms of the last group.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        split_bn: bool = True,
        full_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = _batch_norm(widths[0], split_bn)
        channels = widths[0]
        self.group_names = [f"layer{g + 1}" for g in range(len(widths))]
        for g, (name, width, count) in enumerate(zip(self.group_names, widths, blocks, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                group.append(BasicBlock(channels, width, 2 if g >= full_size and b == 0 else 1, split_bn))
                channels = width
            self.add_module(name, group)
        self.linear = nn.Linear(channels, num_classes)
        last = self.group_names[-1]
        self.invariance_layers = tuple(f"{last}.{b}.{bn}" for b in range(blocks[-1]) for bn in ("bn1", "bn2"))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) in [0, 1]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.group_names:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    """Pre-activation residual block: BN - ReLU - 3x3 - BN - ReLU - 3x3, add."""

    def __init__(self, in_channels: int, channels: int, stride: int, split_bn: bool) -> None:
        super().__init__()
        self.bn1 = _batch_norm(in_channels, split_bn)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = _batch_norm(channels, split_bn)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        return residual + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    """Wide residual network of three groups, convolutions initialised N(0, sqrt(2 / (k^2 C_out)))."""

    def __init__(
        self, depth: int, widen: int, *, num_classes: int, in_channels: int = 3, split_bn: bool = True
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        channels = 16
        for g in range(3):
            group = nn.Sequential()
            for b in range(blocks):
                group.append(WideBlock(channels, 16 * 2**g * widen, 2 if g > 0 and b == 0 else 1, split_bn))
                channels = 16 * 2**g * widen
            self.add_module(f"block{g + 1}", group)
        self.bn1 = _batch_norm(channels, split_bn)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(
                    module.weight, 0.0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
                )
        nn.init.zeros_(self.linear.bias)
        # The last "bn1" is the final pooled feature, which is the average-pooled ReLU of that BatchNorm.
        self.invariance_layers = (
            *(f"block3.{b}.{bn}" for b in range(blocks) for bn in ("bn1", "bn2")),
            "bn1",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W) in [0, 1]."""
        x = self.conv1(x)
        for g in range(3):
            x = self.get_submodule(f"block{g + 1}")(x)
        return self.linear(F.relu(self.bn1(x)).mean((2, 3)))


def resnet18(num_classes: int = 10, in_channels: int = 3, split_bn: bool = True) -> ResNet:
    """CIFAR ResNet-18: 11,183,562 parameters with both branches and 10 classes."""
    return ResNet(
        (64, 128, 256, 512), (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, split_bn=split_bn
    )


def resnet18_lbgat(num_classes: int = 10, in_channels: int = 3, split_bn: bool = True) -> ResNet:
    """The teacher of LBGAT's authors: ResNet-18 whose second group keeps the images' size, 3.2 times the
    arithmetic.
    """
    return ResNet(
        (64, 128, 256, 512),
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        split_bn=split_bn,
        full_size=2,
    )


def resnet8(num_classes: int = 10, in_channels: int = 3, split_bn: bool = True) -> ResNet:
    """ResNet-8, the smallest of the CIFAR family (He et al. 2016): three groups of one block."""
    return ResNet(
        (16, 32, 64), (1, 1, 1), num_classes=num_classes, in_channels=in_channels, split_bn=split_bn
    )


def wrn_34_10(num_classes: int = 10, in_channels: int = 3, split_bn: bool = True) -> WideResNet:
    """WRN-34-10: 46,182,906 parameters with both branches and 10 classes."""
    return WideResNet(34, 10, num_classes=num_classes, in_channels=in_channels, split_bn=split_bn)


MODELS = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet18-lbgat": resnet18_lbgat,
    "wrn-34-10": wrn_34_10,
}


@contextmanager
def attack_mode(
    model: nn.Module, branch: str, batch_statistics: bool, update_statistics: bool = True
) -> Iterator[None]:
    """BN mode and branch for an attack; puts every module's mode and branch back afterwards."""
    before = [(m, m.training, getattr(m, "branch", None)) for m in model.modules()]
    statistics = [] if update_statistics else [(b, b.clone()) for b in model.buffers()]
    model.train(batch_statistics)
    use_branch(model, branch)
    try:
        yield
    finally:
        for module, training, old_branch in before:
            module.training = training
            if isinstance(module, SplitBatchNorm2d):
                module.branch = old_branch or "adv"
        for buffer, value in statistics:
            buffer.copy_(value)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def attack_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """(N,) loss that an attack maximises: "ce"; "margin", the best wrong logit less the true one; or
    "kl", from the probabilities (N, classes) that `labels` then are.
    """
    if kind == "ce":
        return F.cross_entropy(logits, labels, reduction="none")
    if kind == "kl":
        return F.kl_div(F.log_softmax(logits, dim=1), labels, reduction="none").sum(1)
    if kind != "margin":
        raise ValueError(f"loss is {kind!r}; expected ce, kl or margin")
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - true


def random_start(images: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Start offset: uniform in the L-infinity ball; for L2 a normal direction of uniform length up to eps."""
    if norm == "Linf":
        unit = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return (2 * unit - 1) * eps
    direction = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    length = torch.rand(len(images), generator=generator, device=images.device, dtype=images.dtype) * eps
    return direction * _per_image(length / direction.flatten(1).norm(dim=1))


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    norm: str = "Linf",
    start: Tensor | None = None,
    clamp_start: bool = True,
    loss: str = "ce",
    branch: str = "adv",
    batch_statistics: bool = True,
    update_statistics: bool = True,
) -> Tensor:
    """Projected gradient ascent on a loss (Madry et al. 2018); returns the last iterate.

    images: (N, C, H, W) in [0, 1]; eps, alpha in the same pixel units; start: an offset added to the images
    first (clamped with them to [0, 1], unless `clamp_start` is off), or none; loss: "ce", "margin" (Carlini
    and Wagner 2017) or "kl" from the clean prediction (Zhang et al. 2019). Each step: sign of the gradient
    times alpha (L2: gradient over its per-image norm), projection onto the ball, clamp to [0, 1]. With
    `batch_statistics` the network is in train mode and the branch's running statistics are updated at every
    forward, as in the paper, unless `update_statistics` is off; without, eval mode. Images, `.grad`s, modes,
    branches and the other branch's statistics are left alone.
    """
    x = images.detach()
    x_adv = x.clone() if start is None else x + start
    if clamp_start and start is not None:
        x_adv = x_adv.clamp(0, 1)
    target = labels
    if loss == "kl":
        with attack_mode(model, branch, batch_statistics, update_statistics=False), torch.no_grad():
            target = F.softmax(model(x), dim=1)
    with attack_mode(model, branch, batch_statistics, update_statistics), torch.enable_grad():
        for _ in range(steps):
            x_adv.requires_grad_()
            objective = attack_loss(model(x_adv), target, loss).sum()
            (gradient,) = torch.autograd.grad(objective, x_adv)
            x_adv = x_adv.detach()
            if norm == "Linf":
                delta = (x_adv + alpha * gradient.sign() - x).clamp(-eps, eps)
            else:
                tiny = torch.finfo(x.dtype).tiny
                unit = gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp_min(tiny))
                delta = x_adv + alpha * unit - x
                length = delta.flatten(1).norm(dim=1).clamp_min(tiny)
                delta = delta * _per_image((eps / length).clamp_max(1))
            x_adv = (x + delta).clamp(0, 1)
    return x_adv


@contextmanager
def tapped(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the average-pooled ReLU (N, C) of the named BatchNorms' outputs of the forwards inside the
    block.
    """
    features: dict[str, Tensor] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            features[name] = F.relu(output).mean((2, 3))

        return model.get_submodule(name).register_forward_hook(record)

    handles = [hook(name) for name in layers]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def predictor(dim: int) -> nn.Sequential:
    """h: Linear(d, d/4) - BatchNorm1d - ReLU - Linear(d/4, d), the bottleneck MLP on the adversarial side."""
    hidden = dim // 4
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
    )


def distance(prediction: Tensor, target: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """Dist(prediction, target) of two (N, d) features: scalar, averaged over the batch."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=1).mean()
    if kind == "mse":
        return F.mse_loss(prediction, target)
    if kind == "kl":
        log_p = F.log_softmax(prediction / temperature, dim=1)
        log_t = F.log_softmax(target / temperature, dim=1)
        return F.kl_div(log_p, log_t, reduction="batchmean", log_target=True) * temperature**2
    raise ValueError(f"distance is {kind!r}; expected cosine, mse or kl")


class ARAT(nn.Module):
    """The network, its predictors and the loss, with the paper's ablations as switches.

    invariance: "stopgrad" (the method), "symmetric" (the naive loss, nothing stopped), "target-only" (the
    adversarial feature stopped instead), "two-sided" (half each way), "none". `layers` defaults to the
    network's `invariance_layers`. `a` is the auto-balance weight, set once an epoch by `balance`; with
    auto_balance off both cross entropies weigh 1.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        gamma: float = 30.0,
        invariance: str = "stopgrad",
        use_predictor: bool = True,
        auto_balance: bool = True,
        distance: str = "cosine",
        temperature: float = 1.0,
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.gamma, self.invariance, self.auto_balance = gamma, invariance, auto_balance
        self.distance, self.temperature = distance, temperature
        if invariance not in ("none", "symmetric", "stopgrad", "target-only", "two-sided"):
            raise ValueError(
                f"invariance is {invariance!r}; see the class's documentation for its five forms"
            )
        self.layers: tuple[str, ...] = ()
        if invariance != "none":
            self.layers = tuple(layers) or tuple(getattr(network, "invariance_layers", ()))
            if not self.layers:
                raise ValueError("the network names no invariance_layers; give the BatchNorm layers to tap")
        # A ModuleList in the order of `layers`: module names cannot hold the dots of layer names.
        dims = [int(getattr(network.get_submodule(name), "num_features")) for name in self.layers]  # noqa: B009
        self.predictors = nn.ModuleList(predictor(d) if use_predictor else nn.Identity() for d in dims)
        self.register_buffer("a", torch.tensor(0.5))
        self.a: Tensor

    def _invariance_term(self, adv: Tensor, clean: Tensor, h: nn.Module) -> Tensor:
        def dist(prediction: Tensor, target: Tensor) -> Tensor:
            return distance(prediction, target, self.distance, self.temperature)

        if self.invariance == "symmetric":
            return dist(h(adv), clean)
        if self.invariance == "target-only":
            return dist(h(adv.detach()), clean)
        one_way = dist(h(adv), clean.detach())
        return one_way if self.invariance == "stopgrad" else (one_way + dist(clean, adv.detach())) / 2

    def loss(
        self, images: Tensor, x_adv: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted terms, whose sum is minimised, and {"clean", "adv"} logits; clean forward first, train
        mode.
        """
        use_branch(self.network, "clean")
        with tapped(self.network, self.layers) as clean:
            logits_clean = self.network(images)
        use_branch(self.network, "adv")
        with tapped(self.network, self.layers) as adv:
            logits_adv = self.network(x_adv)
        weight_adv, weight_clean = (self.a, 1 - self.a) if self.auto_balance else (1.0, 1.0)
        terms = {
            "ce_adv": weight_adv * F.cross_entropy(logits_adv, labels),
            "ce_clean": weight_clean * F.cross_entropy(logits_clean, labels),
        }
        if self.layers:
            each = [
                self._invariance_term(adv[name], clean[name], h)
                for name, h in zip(self.layers, self.predictors, strict=True)
            ]
            terms["invariance"] = self.gamma * torch.stack(each).mean()
        return terms, {"clean": logits_clean, "adv": logits_adv}

    @torch.no_grad()
    def balance(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Set a to the clean branch's eval-mode accuracy on the given batches (the epoch's first eight)."""
        correct = total = 0
        with attack_mode(self.network, "clean", batch_statistics=False):
            for images, labels in batches:
                correct += int((self.network(images).argmax(1) == labels).sum())
                total += len(labels)
        self.a.fill_(correct / total)
        return correct / total


class Standard(nn.Module):
    """Ordinary training, CE(f(x), y): what an adversarially trained network is compared with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(
        self, images: Tensor, x_adv: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The cross entropy of the images and their logits; x_adv is not used."""
        logits = self.network(images)
        return {"ce_clean": F.cross_entropy(logits, labels)}, {"clean": logits}


def train_step(
    method: ARAT | Standard,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    norm: str = "Linf",
    random: bool = True,
    batch_statistics: bool = True,
    aliased_start: bool = False,
    x_adv: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One iteration: attack, two forwards, backward, optimizer step. Returns detached scalars.

    `aliased_start` does what the authors' released code does: the random start is added to the batch itself,
    so the clean branch sees the noised images and the ball is centred on them. `x_adv`, when given, replaces
    the attack.
    """
    method.train()
    if isinstance(method, ARAT) and x_adv is None:
        start = random_start(images, eps, norm, generator) if random else None
        if aliased_start and start is not None:
            images, start = images + start, None
        x_adv = pgd(
            method.network,
            images,
            labels,
            eps=eps,
            alpha=alpha,
            steps=steps,
            norm=norm,
            start=start,
            batch_statistics=batch_statistics,
        )
    terms, logits = method.loss(images, images if x_adv is None else x_adv, labels)
    total = torch.stack(list(terms.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    metrics = {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}
    for name, values in logits.items():
        metrics[f"accuracy_{name}"] = (values.detach().argmax(1) == labels).float().mean()
    return metrics
