"""Each method compiled: no graph break, the eager iteration's losses and gradients, phases obeyed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from networks import pair, step_of

from arat_fast.config import ARRESTConfig, LBGATConfig, MAILConfig, MARTConfig, TRADESConfig
from arat_fast.methods import ARREST, AT, EMR, LBGAT, MAIL, MART, TRADES, Method
from arat_fast.training.step import TrainStep


def another() -> torch.nn.Module:
    return pair(3, torch.float32)[1]


CASES: dict[str, Callable[[], Method]] = {
    "at": AT,
    "trades": lambda: TRADES(TRADESConfig(duplicate_forward=True)),
    "mart": lambda: MART(MARTConfig()),
    "mail-at": lambda: MAIL("at", MAILConfig()),
    "lbgat": lambda: LBGAT(LBGATConfig(beta=1.0), another()),
    "arrest": lambda: ARREST(ARRESTConfig(), another()),
    "mail-trades+emr": lambda: EMR(MAIL("trades", MAILConfig(warm_up="at")), 0.5, 0.1),
}


def two_steps(make: Callable[[], Method]) -> tuple[TrainStep, TrainStep]:
    """Eager and compiled, from equal weights."""
    return tuple(step_of(pair(0, torch.float32)[1], make(), compiled=c) for c in (False, True))  # type: ignore[return-value]


def assert_same_training(eager: TrainStep, compiled: TrainStep) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(16, 3, 8, 8, generator=generator)
    y = torch.arange(16) % 10
    graphs, plan = 0, compiled.method.plan
    for epoch in (1, 2, 100, 101):  # before and after MAIL's start
        for step in (eager, compiled):
            step.method.on_epoch_start(epoch, 1 / epoch)
        if compiled.method.plan != plan:  # the end of a warm-up by AT: compiled anew, once
            graphs, plan = 0, compiled.method.plan
        x_adv = (x + 0.02).clamp(0, 1)
        expected, metrics = (step(x, y, x_adv=x_adv) for step in (eager, compiled))
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            # KL of nearby images is a difference of large sums.
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
        for a, b in zip(_gradients(eager), _gradients(compiled), strict=True):
            assert float((a - b).norm()) <= 1e-3 * float(a.norm()) + 1e-7
        assert not torch._dynamo.utils.counters["graph_break"]
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing compiled anew


def _gradients(step: TrainStep) -> list[torch.Tensor]:
    modules = (step.model, step.method)
    return [p.grad for m in modules for p in m.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_traced_without_a_break(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo and AOTAutograd, without code generation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert_same_training(*two_steps(CASES[case]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_double_backward_compiled_with_inductor() -> None:
    assert_same_training(*two_steps(CASES["mail-trades+emr"]))
