"""What the training attack lets choose: loss, start, BN mode, branch, radius; each against a plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast import methods, reference
from arat_fast.config import ARATConfig, AttackConfig, TrainConfig, resolved
from arat_fast.kernels.random_start import random_start_reference
from arat_fast.methods.base import Method, Outputs
from arat_fast.models.cifar import ResNet
from arat_fast.nn import bind_branches, from_authors
from arat_fast.training.schedule import warm_up_factor
from arat_fast.training.step import TrainStep

BOTH = ("clean", "adv")


class CrossEntropies(Method):
    """CE(x) + CE(x'), for two kinds of images through one branch or two."""

    plan = BOTH

    def __init__(self, branches: tuple[str, ...], repeats_clean: bool = False) -> None:
        super().__init__()
        self.branches, self.repeats_clean = branches, repeats_clean

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        assert outputs.clean is not None
        assert outputs.adv is not None
        return {"clean": F.cross_entropy(outputs.clean, labels), "adv": F.cross_entropy(outputs.adv, labels)}


def pair(branches: tuple[str, ...], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The reference's network and ours, equal, with statistics that differ from 0 and 1."""
    torch.manual_seed(0)
    split = branches == BOTH
    plain = reference.ResNet((8, 16), (1, 1), num_classes=10, split_bn=split).to(dtype)
    x, _ = images(dtype)
    plain.train()
    for branch in branches if split else ():
        reference.use_branch(plain, branch)
        plain(x)
    ours = ResNet((8, 16), (1, 1), num_classes=10, branches=branches)
    bind_branches(ours)
    ours.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = plain.state_dict()
    ours.load_state_dict(from_authors(state) if split else state)
    return plain, ours


def images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(6)


def step_of(model: nn.Module, method: Method, **options: Any) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    defaults: dict[str, Any] = {"attack": AttackConfig(steps=3), "precision": "fp32", "compiled": False}
    return TrainStep(model, method, optimizer, **(defaults | options))


def plain_attack(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, kind: str, steps: int) -> Tensor:
    """Linf PGD written out, in the mode and branch that the model is in."""
    with torch.no_grad():
        clean = model(x).softmax(1)
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if kind == "kl":
            objective = (clean * (clean.log() - logits.log_softmax(1))).sum()
        elif kind == "margin":
            wrong = torch.stack(
                [torch.cat([r[:c], r[c + 1 :]]).max() for r, c in zip(logits, y, strict=True)]
            )
            objective = (wrong - logits[torch.arange(len(y)), y]).sum()
        else:
            objective = F.cross_entropy(logits, y, reduction="sum")
        (g,) = torch.autograd.grad(objective, x_adv)
        x_adv = (x + (x_adv + 2 / 255 * g.sign() - x).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
    return x_adv.detach()


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("branch", BOTH)
def test_losses_and_branches_on_running_statistics(loss: str, branch: str) -> None:
    plain, ours = pair(BOTH)
    x, y = images()
    attack = AttackConfig(steps=3, loss=loss, start="normal", bn="running", branch=branch)  # type: ignore[arg-type]
    step = step_of(ours, CrossEntropies(BOTH), attack=attack)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    _, x_adv = step.attack(x, y)
    start = step.attack._start(x, None)
    assert 0 < float((start - x).abs().max()) < 0.006  # 0.001 normal
    plain.eval()
    reference.use_branch(plain, branch)
    torch.testing.assert_close(x_adv, plain_attack(plain, x, y, start, loss, 3), rtol=0, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_only_the_normal_start_leaves_the_pixels_range() -> None:
    """TRADES' authors leave the clamp to the first step; black pixels differ otherwise."""
    plain, ours = pair(("adv",))
    x, y = images()
    x = (1.6 * x - 0.3).clamp(0, 1)
    attack = AttackConfig(steps=1, loss="kl", start="normal", bn="running")
    step = step_of(ours, CrossEntropies(("adv",)), attack=attack)
    start = step.attack._start(x, None)
    expected = random_start_reference(x, 0.0, step.attack.seed, step.attack.offset, "normal", clamp=False)
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-12)
    assert start.min() < 0
    assert start.max() > 1
    _, x_adv = step.attack(x, y)
    torch.testing.assert_close(x_adv, plain_attack(plain.eval(), x, y, expected, "kl", 1), rtol=0, atol=1e-9)
    for norm in ("Linf", "L2"):
        attack = AttackConfig(start="uniform", norm=norm)  # type: ignore[arg-type]
        uniform = step_of(ours, CrossEntropies(("adv",)), attack=attack).attack._start(x, None)
        assert torch.equal(uniform, uniform.clamp(0, 1))


def test_kl_on_batch_statistics_counts_the_attack_forwards_only() -> None:
    plain, ours = pair(("adv",))
    x, y = images()
    step = step_of(ours, CrossEntropies(("adv",)), attack=AttackConfig(steps=2, loss="kl", start="uniform"))
    _, x_adv = step.attack(x, y)
    assert int(ours.get_submodule("bn1").num_batches_tracked) == 2  # type: ignore[arg-type]
    expected = plain_attack(plain.train(), x, y, step.attack._start(x, None), "kl", 2)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("repeats", [False, True])
def test_one_branch_sees_both_kinds_in_one_batch(repeats: bool) -> None:
    """Losses, gradients and running statistics of two forwards in turn; `repeats_clean` makes it three."""
    plain, ours = pair(("adv",))
    x, y = images()
    x_adv = (x + 0.02).clamp(0, 1)
    step = step_of(ours, CrossEntropies(("adv",), repeats))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    plain.train()
    terms = [F.cross_entropy(plain(part), y) for part in (x, x_adv)]
    if repeats:
        plain(x)
    sum(terms).backward()  # type: ignore[union-attr]
    optimizer.step()
    metrics = step(x, y, x_adv=x_adv)
    torch.testing.assert_close(metrics["clean"], terms[0].detach())
    torch.testing.assert_close(metrics["adv"], terms[1].detach())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name].reshape(value.shape), msg=name)


def test_radius_follows_the_warm_up() -> None:
    _, ours = pair(BOTH, torch.float32)
    step = step_of(ours, CrossEntropies(BOTH))
    x, y = images(torch.float32)
    for epoch, factor in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        config = TrainConfig(attack=AttackConfig(warmup_epochs=4))
        assert warm_up_factor(config, epoch) == factor
        step.attack.set_radius(factor)
        centre, x_adv = step.attack(x, y)
        assert float((x_adv - centre).abs().max()) == pytest.approx(factor * 8 / 255, abs=1e-6)
    assert warm_up_factor(TrainConfig(), 1) == 1


def test_auto_choices_are_the_methods_and_recorded() -> None:
    for name, chosen in {"trades": ("kl", "normal", "running"), "at": ("ce", "uniform", "batch")}.items():
        attack = resolved(TrainConfig(method=name)).attack  # type: ignore[arg-type]
        assert (attack.loss, attack.start, attack.bn) == chosen
    own = resolved(TrainConfig(method="trades", attack=AttackConfig(loss="ce", bn="batch"))).attack
    assert (own.loss, own.start, own.bn) == ("ce", "normal", "batch")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_and_scales(precision: str) -> None:
    _, ours = pair(BOTH, torch.float32)
    layers = ours.invariance_layers
    dims = {name: ours.get_submodule(name).num_features for name in layers}  # type: ignore[union-attr]
    method = methods.ARAT(ARATConfig(gamma=3.0), dims)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([*ours.parameters(), *method.parameters()], lr=0.02, momentum=0.9, fused=True)
    step = TrainStep(
        ours,
        method,
        optimizer,
        attack=AttackConfig(steps=2),
        precision=precision,  # type: ignore[arg-type]
        compiled=False,
    )
    assert (step.scaler is not None) == (precision == "fp16")
    x, y = images(torch.float32)
    losses = [float(step(x, y)["loss"]) for _ in range(8)]
    assert all(torch.isfinite(p).all() for p in ours.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_fp16_skips_an_overflowing_step_and_lowers_its_scale() -> None:
    _, ours = pair(("adv",), torch.float32)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.02, momentum=0.9, fused=True)
    step = TrainStep(
        ours,
        CrossEntropies(("adv",)),
        optimizer,
        attack=AttackConfig(steps=1),
        precision="fp16",
        compiled=False,
    )
    assert step.scaler is not None
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # type: ignore[attr-defined]
    before = [p.clone() for p in ours.parameters()]
    x, y = images(torch.float32)
    step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    assert step.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "foo"}, r"attack\.loss is 'foo'"),
        ({"start": "foo"}, r"attack\.start is 'foo'"),
        ({"bn": "foo"}, r"attack\.bn is 'foo'"),
        ({"norm": "L1"}, r"attack\.norm is 'L1'"),
        ({"steps": 0}, r"attack\.steps is 0"),
        ({"eps": -0.1}, r"attack\.eps is -0\.1"),
    ],
)
def test_an_attack_that_is_none_is_refused(wrong: dict[str, Any], message: str) -> None:
    _, ours = pair(BOTH, torch.float32)
    with pytest.raises(ValueError, match=message):
        step_of(ours, CrossEntropies(BOTH), attack=AttackConfig(**wrong))


def test_an_optimizer_made_too_early_is_refused() -> None:
    _, ours = pair(BOTH, torch.float32)
    layers = ours.invariance_layers
    dims = {name: ours.get_submodule(name).num_features for name in layers}  # type: ignore[union-attr]
    method = methods.ARAT(ARATConfig(), dims)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold method\.predictors\.0\.0\.weight, .* and \d+ more"):
        TrainStep(ours, method, optimizer, attack=AttackConfig())
    method.requires_grad_(False)
    TrainStep(ours, method, optimizer, attack=AttackConfig())
