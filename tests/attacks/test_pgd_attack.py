"""PGD against the reference's, in float64, for every choice; and what it leaves alone."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from plain import Scaled, batch, convolutional, networks, state_of
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.attacks import PGD
from arat_fast.kernels.random_start import random_start

EPS = 8 / 255


def start_of(x: Tensor, attack: PGD) -> Tensor | None:
    """The first call's start as an offset, drawn from the same numbers."""
    if not attack.random_start:
        return None
    kind = "normal" if attack.start == "normal" else "uniform" if attack.norm == "Linf" else "l2"
    return random_start(x, attack.eps, seed=attack.seed, offset=0, kind=kind) - x  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("start", ["uniform", "normal", None])
@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_equals_the_reference(norm: Any, loss: str, bn: Any, start: Any, branch: str) -> None:
    plain, ours = networks()
    x, y = batch()
    eps, alpha = (EPS, EPS / 4) if norm == "Linf" else (0.5, 0.125)
    random: dict[str, Any] = {"random_start": start is not None, "start": start or "normal", "seed": 7}
    attack = PGD(ours, eps, alpha, 3, norm=norm, loss=loss, bn=bn, branch=branch, **random)
    expected = reference.pgd(
        plain,
        x,
        y,
        eps=eps,
        alpha=alpha,
        steps=3,
        norm=norm,
        start=start_of(x, attack),
        loss=loss,
        branch=branch,
        batch_statistics=bn == "batch",
        update_statistics=False,
    )
    x_adv = attack(x, y)
    assert x_adv.dtype == torch.float64
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)
    assert float((x_adv - x).abs().amax()) > 0.001  # it moved


@pytest.mark.parametrize(("bn", "update"), [("running", False), ("batch", False), ("batch", True)])
def test_kl_from_one_clean_prediction(bn: Any, update: bool) -> None:
    plain, ours = networks()
    x, y = batch()
    attack = PGD(ours, steps=3, loss="kl", start="normal", bn=bn, branch="clean", update_statistics=update)
    start = start_of(x, attack)
    assert start is not None
    reference.use_branch(plain, "clean")
    plain.train(bn == "batch")
    target = copy.deepcopy(plain)(x).softmax(1).detach()
    x_adv = x + start
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        kl = (target * (target.log() - plain(x_adv).log_softmax(1))).sum()
        (g,) = torch.autograd.grad(kl, x_adv)
        x_adv = (x + (x_adv + 2 / 255 * g.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    torch.testing.assert_close(attack(x, y), x_adv.detach(), rtol=0, atol=1e-9)
    if update:  # three attack forwards; the clean one is not counted
        assert ours.get_buffer("bn1.num_batches_tracked").tolist() == [4, 1]
        theirs = plain.get_buffer("bn1.clean.running_mean")
        torch.testing.assert_close(ours.get_buffer("bn1.running_mean")[0], theirs)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_statistics_are_updated_where_asked(norm: Any) -> None:
    """ARAT's training attack: batch statistics of the adv branch, moved by every forward."""
    plain, ours = networks()
    x, y = batch()
    attack = PGD(ours, steps=3, norm=norm, bn="batch", update_statistics=True, branch="adv")
    reference.pgd(plain, x, y, steps=3, norm=norm, start=start_of(x, attack))
    attack(x, y)
    stacked = ours.state_dict()
    for name, value in plain.state_dict().items():
        for k, branch in enumerate(reference.BRANCHES):
            if f".{branch}." in name:
                torch.testing.assert_close(stacked[name.replace(f"{branch}.", "")][k], value, msg=name)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_plain_batch_norm_in_batch_mode(update: bool, training: bool) -> None:
    """As a model of which BatchNorm alone is in train mode; dropout plays no part."""
    model = convolutional(dropout=0.5).double().train(training)
    twin = convolutional(dropout=0.0).double()
    x, y = batch()
    before = state_of(model)
    attack = PGD(model, steps=3, bn="batch", update_statistics=update)
    expected = reference.pgd(twin, x, y, steps=3, start=start_of(x, attack), update_statistics=update)
    torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=1e-9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not update or "network.1.running" not in name) or (
            update and name.endswith("num_batches_tracked")
        )
        torch.testing.assert_close(value, twin.state_dict()[name])
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_changes(bn: Any, training: bool, fails: bool) -> None:
    _, split = networks(torch.float32)
    model = nn.Sequential(split).train(training)
    split.get_submodule("bn1").eval()  # frozen by its owner
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    modes = [m.training for m in model.modules()]
    state, flags = state_of(model), [p.requires_grad for p in parameters]
    x, y = batch(torch.float32)
    x_before = x.clone()
    seen: list[str] = []
    linear = split.get_submodule("linear")

    def watch(_module: nn.Module, _inputs: object) -> None:
        seen.append("x")
        if fails and len(seen) == 2:
            raise KeyError("from within the model")

    handle = linear.register_forward_pre_hook(watch)
    attack = PGD(model, steps=3, bn=bn, branch="clean")
    if fails:
        with pytest.raises(KeyError, match="within"):
            attack(x, y)
    else:
        x_adv = attack(x, y)
        assert not x_adv.requires_grad
        assert len(seen) == 3
    handle.remove()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in parameters] == flags
    assert [p.grad is None for p in parameters] == [k != 1 for k in range(len(parameters))]
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert list(model.parameters()) == parameters or all(
        a is b for a, b in zip(model.parameters(), parameters, strict=True)
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    state_now = split.get_submodule("bn1").state  # type: ignore[union-attr]
    assert (state_now.branch, state_now.statistics, state_now.update) == ("adv", "auto", True)
    assert torch.equal(x, x_before)


def test_weight_gradients_are_never_computed() -> None:
    """With running statistics a convolution's weight gradient would be the only use of its input."""
    _, ours = networks(torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x, y = batch(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        PGD(ours, steps=1)(x, y)
    attacked = sum(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.autograd.grad(ours.eval()(x.requires_grad_()).sum(), x)
    assert attacked < 0.75 * sum(kept)


def test_starts_differ_between_calls_and_repeat_after_reset() -> None:
    _, ours = networks(torch.float32)
    x, y = batch(torch.float32)
    attack = PGD(ours, steps=1, seed=3)
    first, second = attack(x, y), attack(x, y)
    assert not torch.equal(first, second)
    attack.reset(3)
    assert torch.equal(attack(x, y), first)
    attack.reset(4)
    assert not torch.equal(attack(x, y), first)
    assert torch.equal(PGD(ours, steps=1, seed=3)(x, y), first)
    attack.reset(3)
    attack(x, y)
    attack.reset()
    assert torch.equal(attack(x, y), first)


def test_without_a_seed_the_starts_are_torchs_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(torch.float32)
    model = convolutional()
    first, second = (PGD(model, steps=1)(x, y) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first, second = (PGD(model, steps=1)(x, y) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(PGD(model, steps=1)(x, y), first)
    state = torch.get_rng_state()
    PGD(model, steps=1, seed=5)(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)  # two ranks that seed alike
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.equal(PGD(model, steps=1)(x, y), first)


def test_of_a_data_parallel_model() -> None:
    _, ours = networks()
    x, y = batch()
    expected = PGD(ours, steps=2, branch="adv", seed=0)(x, y)
    attack = PGD(nn.DataParallel(ours), steps=2, branch="adv", seed=0)
    torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=0)
    inside = PGD(nn.Sequential(nn.DataParallel(ours)), steps=2, branch="adv", seed=0)
    torch.testing.assert_close(inside(x, y), expected, rtol=0, atol=0)


class Aliased(nn.Module):
    """A classifier under two names, a layer run twice, and weights tied between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.body = nn.Sequential(self.conv, self.bn, nn.ReLU(), self.conv)
        self.head = nn.Linear(3, 6)
        self.fc, self.tied = self.head, nn.Linear(3, 6)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x).mean((2, 3))
        return self.fc(pooled) + self.tied(pooled)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_modules_under_two_names_stay_what_they_were(bn: Any) -> None:
    torch.manual_seed(0)
    model = Aliased().double()
    x, y = batch()
    parameters, statistics = dict(model.named_parameters()), model.bn.running_mean.clone()
    found = PGD(model, steps=2, bn=bn, random_start=False)(x, y)
    assert dict(model.named_parameters()) == parameters  # Parameters compare by identity
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())
    assert model.head is model.fc
    assert model.tied.weight is model.head.weight
    assert torch.equal(model.bn.running_mean, statistics)
    model.train(bn == "batch")
    expected = x
    for _ in range(2):
        at = expected.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(at), y), at)
        expected = (expected + 2 / 255 * gradient.sign()).clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_own_losses() -> None:
    _, ours = networks()
    x, y = batch()

    def each(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    expected = PGD(ours, steps=2, norm="L2", eps=0.5, alpha=0.2, seed=0)(x, y)
    for loss in (each, lambda z, t: each(z, t).sum()):
        found = PGD(ours, steps=2, norm="L2", eps=0.5, alpha=0.2, seed=0, loss=loss)(x, y)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_keep_their_layout_and_become_fp32(dtype: torch.dtype, channels_last: bool) -> None:
    x, y = batch(dtype, channels_last)
    x_adv = PGD(convolutional(), steps=2)(x, y)
    assert x_adv.dtype == torch.float32
    assert x_adv.stride() == x.stride()
    assert float((x_adv - x.float()).abs().max()) <= EPS + 1e-7
    sliced = torch.rand(6, 3, 12, 24)[..., ::2]
    assert PGD(convolutional(), steps=1)(sliced, y).is_contiguous()


@pytest.mark.parametrize(
    ("split", "how"),  # split BatchNorm keeps its parameters in fp32
    [
        (False, "autocast"),
        (False, "weights"),
        (False, "images too"),
        (True, "autocast"),
        (True, "images too"),
    ],
)
def test_bf16_stays_in_the_ball(how: str, split: bool) -> None:
    model = networks(torch.float32)[1] if split else convolutional()
    x, y = batch(torch.float32)
    exact = PGD(model, steps=10, seed=0)(x, y)
    if how != "autocast" and not split:
        model = model.to(torch.bfloat16)
    if how == "images too":
        x = x.to(torch.bfloat16)
    attack = PGD(model, steps=10, seed=0, precision="bf16" if how == "autocast" else None)
    x_adv = attack(x, y)
    assert x_adv.dtype == torch.float32
    distance = float((x_adv - x.float()).abs().max())
    assert 0.99 * EPS < distance <= EPS + 6e-8  # half a unit in the last place of a pixel near 1
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    if how == "autocast":
        assert float((x_adv - exact).abs().mean()) < 0.2 * EPS  # the same attack, but for some signs


def test_fp32_switches_a_callers_autocast_off() -> None:
    model = convolutional()
    x, y = batch(torch.float32)
    expected = PGD(model, steps=2, seed=0)(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PGD(model, steps=2, seed=0, precision="fp32")(x, y), expected)
        assert not torch.equal(PGD(model, steps=2, seed=0)(x, y), expected)


def test_inside_no_grad_and_inference_mode() -> None:
    model = convolutional()
    x, y = batch(torch.float32)
    expected = PGD(model, steps=2, seed=0)(x, y)
    with torch.no_grad():
        assert torch.equal(PGD(model, steps=2, seed=0)(x, y), expected)
    with torch.inference_mode():
        assert torch.equal(PGD(model, steps=2, seed=0)(x.clone(), y.clone()), expected)


class TinyTransformer(nn.Module):
    """No BatchNorm anywhere: LayerNorm, attention, dropout, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 0])


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_transformer(bn: Any, loss: str) -> None:
    torch.manual_seed(0)
    model = TinyTransformer().double()
    x, y = batch()
    attack = PGD(model, steps=3, bn=bn, loss=loss)
    x_adv = attack(x, y)
    if loss == "ce":
        expected = reference.pgd(
            model.eval(), x, y, steps=3, start=start_of(x, attack), batch_statistics=False
        )
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)
    half = PGD(model.float(), steps=3, bn=bn, loss=loss, precision="bf16")(x.float(), y)
    assert 0 < float((half - x).abs().max()) <= EPS + 6e-8
    assert not torch.equal(half, x_adv.float())


def check_compiled(model: nn.Module, bn: Any) -> None:
    x, y = batch()
    kwargs: dict[str, Any] = {
        "steps": 2,
        "bn": bn,
        "update_statistics": bn == "batch",
        "norm": "L2",
        "eps": 0.5,
        "seed": 0,
    }
    twin = copy.deepcopy(model)
    expected = PGD(twin, **kwargs)(x, y)
    attack = PGD(model, compile=True, **kwargs)
    torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=1e-9)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    attack(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("split", [False, True])
def test_one_graph_and_the_eager_iterates(bn: Any, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo and AOTAutograd make of it; without Inductor, which takes its time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_compiled(networks()[1] if split else convolutional().double(), bn)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    check_compiled(networks()[1], "running")


def test_of_a_compiled_model() -> None:
    model = Scaled(networks(torch.float32)[1])
    x, y = batch(torch.float32)
    expected = PGD(model, steps=2, seed=0)(x, y)
    found = PGD(torch.compile(model, backend="aot_eager"), steps=2, seed=0)(x, y)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
