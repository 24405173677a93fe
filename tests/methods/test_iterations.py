"""Whole iterations in float64 against plain PyTorch: losses, updates of weights, statistics and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, images, pair, sgd, step_of
from torch import Tensor, nn

from arat_fast.config import ARRESTConfig, AttackConfig, LBGATConfig, MAILConfig, MARTConfig, TRADESConfig
from arat_fast.methods import ARREST, AT, EMR, LBGAT, MAIL, MART, TRADES, Method
from arat_fast.training.step import TrainStep

Terms = dict[str, Tensor]


class ReplayedByHand:
    """A graph for machines without CUDA: a replay runs the recorded body again."""

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def record(self, body: Callable[[], None]) -> None:
        self.body = body

    def replay(self) -> None:
        self.body()


Plain = Callable[[nn.Module, Tensor, Tensor, Tensor], Terms]


def plain_kl(clean: Tensor, adv: Tensor) -> Tensor:
    p = clean.softmax(1)
    return (p * (p.log() - adv.softmax(1).log())).sum(1)


def plain_at(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    return {"ce_adv": F.cross_entropy(net(x_adv), y)}


def plain_trades(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    clean, adv = net(x), net(x_adv)
    return {"ce_clean": F.cross_entropy(clean, y), "kl": 6 * plain_kl(clean, adv).mean()}


def plain_trades_twice(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    """As the published code: the clean images forwarded twice."""
    first, adv = net(x), net(x_adv)
    return {"ce_clean": F.cross_entropy(first, y), "kl": 6 * plain_kl(net(x), adv).mean()}


def wrong_class(p: Tensor, y: Tensor) -> Tensor:
    top = p.argsort(1)[:, -2:]
    return torch.where(top[:, 1] == y, top[:, 0], top[:, 1])


def plain_mart(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    clean, adv = net(x), net(x_adv)
    q, p = adv.softmax(1), clean.softmax(1)
    rows = torch.arange(len(y))
    bce = F.cross_entropy(adv, y) - (1.0001 - q[rows, wrong_class(q, y)] + 1e-12).log().mean()
    kl = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return {"bce": bce, "kl": 5 * (kl * (1.0000001 - p[rows, y])).mean()}


def plain_mail_at(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    adv = net(x_adv)
    q = adv.detach().softmax(1)
    rows = torch.arange(len(y))
    w = 3 * torch.sigmoid(10 * (q[rows, wrong_class(q, y)] - q[rows, y] - 0.5))
    return {"ce_adv": (w * F.cross_entropy(adv, y, reduction="none")).mean()}


def with_emr(base: Plain, coefficient: float, temperature: float) -> Plain:
    """The authors' order: the base's forwards, then one in eval mode; lambda is N times the coefficient."""

    def terms(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        result = base(net, x, x_adv, y)
        net.eval()
        at = x_adv.clone().requires_grad_()
        z = net(at)
        s = ((z / temperature).softmax(1).detach() * z).sum(1).mean()
        (g,) = torch.autograd.grad(s, at, create_graph=True)
        net.train()
        return result | {"emr": coefficient * len(x) * (g**2).sum()}

    return terms


def started(method: Method, epoch: int = 80) -> Method:
    method.on_epoch_start(epoch, 1.0)
    return method


CASES: dict[str, tuple[Callable[[], Method], Plain]] = {
    "at": (AT, plain_at),
    "trades": (lambda: TRADES(TRADESConfig()), plain_trades),
    "trades, duplicate": (lambda: TRADES(TRADESConfig(duplicate_forward=True)), plain_trades_twice),
    "mart": (lambda: MART(MARTConfig()), plain_mart),
    "mail-at": (lambda: started(MAIL("at", MAILConfig())), plain_mail_at),
    "at+emr": (lambda: EMR(AT(), 0.7, 0.1), with_emr(plain_at, 0.7, 0.1)),
    "trades+emr": (lambda: EMR(TRADES(TRADESConfig()), 0.3, 1.0), with_emr(plain_trades, 0.3, 1.0)),
    "mart+emr": (lambda: EMR(MART(MARTConfig()), 0.3, 40.0), with_emr(plain_mart, 0.3, 40.0)),
    "mail-at+emr": (
        lambda: EMR(started(MAIL("at", MAILConfig())), 0.3, 0.1),
        with_emr(plain_mail_at, 0.3, 0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_iterations_equal_plain_ones(case: str) -> None:
    make, terms_of = CASES[case]
    plain, ours = pair()
    method = make().double()
    step, optimizer = step_of(ours, method), sgd(plain)
    x, x_adv, y = images()
    for _ in range(2):
        plain.train()
        expected = terms_of(plain, x, x_adv, y)
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        optimizer.step()
        metrics = step(x, y, x_adv=x_adv)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-9, atol=1e-9)
            assert float(value.detach()) > 0
    assert_same(plain, ours)


@pytest.mark.parametrize("capture", [False, True])
def test_mail_warmed_up_by_at_forwards_the_clean_images_from_its_start_on(capture: bool) -> None:
    """Statistics as the EMR authors' scripts move them: by x' alone first, then by x and x'."""

    def plain_mail_trades(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        clean, adv = net(x), net(x_adv)
        q, rows = adv.detach().softmax(1), torch.arange(len(y))
        w = 3 * torch.sigmoid(2 * (q[rows, wrong_class(q, y)] - q[rows, y]))
        return {"ce_clean": F.cross_entropy(clean, y), "kl": 5 * (w * plain_kl(clean, adv)).mean()}

    plain, ours = pair()
    method = EMR(MAIL("trades", MAILConfig(start_epoch=3, warm_up="at")), 0.3, 0.1).double()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, 0.9, weight_decay=5e-4)
    fused = torch.optim.SGD(ours.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)
    attack = AttackConfig(steps=1, start="none", bn="running", loss="ce")
    step = TrainStep(ours, method, fused, attack=attack, precision="fp32", compiled=False)
    step._capture, step._make_graph = capture, lambda _beside: ReplayedByHand()
    x, _, y = images()
    graphs = []
    for epoch in (1, 2, 3, 4):
        base = with_emr(plain_at if epoch < 3 else plain_mail_trades, 0.3, 0.1)
        method.on_epoch_start(epoch, 1.0)
        _, x_adv = step.attack(x.contiguous(memory_format=torch.channels_last), y)
        plain.train()
        expected = base(plain, x, x_adv, y)
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        optimizer.step()
        metrics = step(x, y)
        assert [name for name in metrics if name in expected] == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-6, atol=1e-7)
        graphs += [id(c) for c in step.captured]
    assert_same(plain, ours, 1e-6)  # the captured rate is a float
    # Each plan has a graph of its own, which its second epoch uses again.
    assert [graphs.count(g) for g in dict.fromkeys(graphs)] == ([2, 2] if capture else [])


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("clean_statistics", [False, True])
def test_lbgat_trains_student_and_teacher(beta: float, clean_statistics: bool) -> None:
    plain, ours = pair()
    plain_teacher, teacher = pair(seed=3)
    config = LBGATConfig(beta=beta, clean_statistics=clean_statistics)
    step, optimizer = step_of(ours, LBGAT(config, teacher)), sgd(plain, plain_teacher)
    x, x_adv, y = images()
    before = [p.clone() for p in teacher.parameters()]
    for _ in range(2):
        plain.train()
        plain_teacher.train()
        # With beta the clean part of our batch comes first; the published order matters to statistics only.
        clean = plain(x) if beta else None
        adv, taught = plain(x_adv), plain_teacher(x)
        expected = {"mse": F.mse_loss(adv, taught), "ce_teacher": F.cross_entropy(taught, y)}
        if clean is not None:
            expected["kl"] = beta * plain_kl(clean, adv).mean()
        elif clean_statistics:
            plain(x)
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        optimizer.step()
        metrics = step(x, y, x_adv=x_adv)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-9, atol=1e-9)
    assert ("kl" in metrics) == (beta > 0)
    assert_same(plain, ours)
    assert_same(plain_teacher, teacher)
    assert all(not torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_lbgats_teacher_learns_from_the_student_too() -> None:
    """The distance's gradient reaches the teacher: nothing is detached."""
    _, ours = pair()
    _, teacher = pair(seed=3)
    method = LBGAT(LBGATConfig(), teacher)
    caught: dict[str, Tensor] = {}
    original = method.loss
    method.loss = lambda o, y: caught.update(original(o, y)) or caught  # type: ignore[func-returns-value,method-assign]
    x, x_adv, y = images()
    step = step_of(ours, method)
    step.method.train()
    step._training_forward(x.contiguous(memory_format=torch.channels_last), x_adv, y)
    gradients = torch.autograd.grad(caught["mse"], list(teacher.parameters()))
    assert all(float(g.abs().max()) > 0 for g in gradients)


def penultimate(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the classifier's input."""
    seen: list[Tensor] = []
    handle = net.get_submodule("linear").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits = net(x)
    handle.remove()
    return logits, seen[0]


def test_arrest_follows_a_frozen_teacher() -> None:
    plain, ours = pair()
    plain_teacher, teacher = pair(seed=3)
    method = ARREST(ARRESTConfig(weight=10), teacher)
    step, optimizer = step_of(ours, method), sgd(plain)
    x, x_adv, y = images()
    for _ in range(2):
        plain.train()
        plain_teacher.eval()
        logits, features = penultimate(plain, x_adv)
        with torch.no_grad():
            _, target = penultimate(plain_teacher, x)
        cosine = (features * target).sum(1) / (features.norm(dim=1) * target.norm(dim=1))
        expected = {"ce_adv": F.cross_entropy(logits, y), "distillation": 10 * (1 - cosine).mean()}
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        optimizer.step()
        metrics = step(x, y, x_adv=x_adv)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-9, atol=1e-9)
    assert_same(plain, ours)
    assert_same(plain_teacher, teacher, 0)  # neither weights nor statistics moved
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert method.train().training
    assert not any(m.training for m in teacher.modules())


def test_the_kl_attack_sees_the_students_running_statistics_only() -> None:
    """LBGAT's published attack: nothing of student or teacher moves while attacking."""
    _, ours = pair()
    _, teacher = pair(seed=3)
    step = step_of(ours, LBGAT(LBGATConfig(), teacher), attack=AttackConfig(steps=2))
    assert (step.settings.loss, step.settings.start, step.settings.bn) == ("kl", "normal", "running")
    before = [t.clone() for m in (ours, teacher) for t in m.state_dict().values()]
    x, _, y = images()
    _, x_adv = step.attack(x.contiguous(memory_format=torch.channels_last), y)
    assert float((x_adv - x).abs().max()) > 2 / 255
    after = [t for m in (ours, teacher) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_cached_clean_probabilities_give_the_uncached_attacks_images() -> None:
    """TRADES as published: softmax(f(x)) anew in each of the steps, eval mode."""
    plain, ours = pair()
    plain.eval()
    step = step_of(ours, TRADES(TRADESConfig()), attack=AttackConfig(steps=5, eps=0.031, alpha=0.007))
    x, _, y = images()
    _, x_adv = step.attack(x.contiguous(memory_format=torch.channels_last), y)
    expected = step.attack._start(x.contiguous(memory_format=torch.channels_last), None)
    for _ in range(5):
        at = expected.detach().requires_grad_()
        loss = F.kl_div(plain(at).log_softmax(1), plain(x).softmax(1), reduction="sum")
        (g,) = torch.autograd.grad(loss, at)
        expected = torch.min(torch.max(at.detach() + 0.007 * g.sign(), x - 0.031), x + 0.031).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_losses_wide_logits_and_close_terms(precision: str) -> None:
    x, x_adv, y = (t.float() if t.is_floating_point() else t for t in images())
    for make in (
        lambda: MART(MARTConfig()),
        lambda: EMR(AT(), 1.0, 1.0),
        lambda: LBGAT(LBGATConfig(), pair(3, torch.float32)[1]),
        lambda: ARREST(ARRESTConfig(), pair(3, torch.float32)[1]),
    ):
        method, exact = make(), make()
        seen: list[torch.dtype] = []
        original = method.loss

        def loss(outputs, labels, original=original, seen=seen):  # type: ignore[no-untyped-def]
            terms = original(outputs, labels)
            seen.extend([outputs.adv.dtype, *(t.dtype for t in terms.values())])
            return terms

        method.loss = loss  # type: ignore[method-assign]
        convolved: dict[Method, torch.dtype] = {}  # by the second network
        for one in (method, exact):
            if isinstance(one, LBGAT | ARREST):
                one.teacher.get_submodule("conv1").register_forward_hook(
                    lambda _module, _inputs, output, one=one, to=convolved: to.update({one: output.dtype})
                )
        step = step_of(pair(0, torch.float32)[1], method, precision=precision)
        low = step(x, y, x_adv=x_adv)
        full = step_of(pair(0, torch.float32)[1], exact)(x, y, x_adv=x_adv)
        assert set(seen) == {torch.float32}
        assert convolved in ({}, {method: step.dtype, exact: torch.float32})
        for name, value in full.items():
            if not name.startswith("accuracy"):
                assert float(low[name]) == pytest.approx(float(value), rel=0.05, abs=0.01), name
