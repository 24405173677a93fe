"""What compiled passes and optimizers are given before their first iteration."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._inductor.exc
from torch import Tensor

from arat_fast.training.compiled import MISSING, compiled_pass, name_fallbacks_only, tracing
from arat_fast.training.finite import FiniteGuard
from arat_fast.training.momentum import start_momentum


class Scaled:
    """As the iterations of a process do, all instances share one piece of code."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_process_compiles_more_variants_than_torch_s_limit() -> None:
    limit = torch._dynamo.config.recompile_limit
    for k in range(limit + 3):
        compiled = torch.compile(Scaled(k).__call__, fullgraph=True, dynamic=False, backend="eager")
        with tracing():
            assert torch.equal(compiled(torch.ones(k + 2)), torch.full((k + 2,), float(k)))
    assert torch._dynamo.config.recompile_limit == limit


class Unwritable:
    """An input whose text takes minutes."""

    def __str__(self) -> str:
        raise AssertionError("written out")

    __repr__ = __str__


@pytest.mark.parametrize("name", MISSING)
def test_the_inputs_of_operators_without_a_lowering_are_written_for_a_log_that_asks(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_pass(lambda x: x)
    text = getattr(torch._inductor.exc, name).operator_str
    with caplog.at_level(logging.WARNING, "torch._inductor.graph"):
        assert text("op", [Unwritable()], {"dim": Unwritable()}).strip() == "target: op"
    with caplog.at_level(logging.INFO, "torch._inductor.graph"):
        assert "args[0]: 3" in text("op", [3], {})
        with pytest.raises(AssertionError, match="written out"):
            text("op", [Unwritable()], {})


def test_a_pytorch_that_names_its_operators_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MISSING:
        monkeypatch.delattr(torch._inductor.exc, name)
    before = dict(vars(torch._inductor.exc))
    name_fallbacks_only.__wrapped__()
    assert dict(vars(torch._inductor.exc)) == before


@pytest.mark.parametrize("nesterov", [False, True])
def test_started_momentum_takes_the_steps_that_plain_sgd_takes(nesterov: bool) -> None:
    def train(started: bool) -> list[Tensor]:
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)]
        optimizer = torch.optim.SGD(weights, lr=0.3, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
        if started:
            start_momentum(optimizer)
            assert all(not optimizer.state[w]["momentum_buffer"].any() for w in weights)
        for _ in range(3):
            optimizer.zero_grad()
            sum(w.pow(3).sum() for w in weights).backward()  # type: ignore[union-attr]
            optimizer.step()
        return [w.detach() for w in weights]

    for one, other in zip(train(True), train(False), strict=True):
        assert torch.equal(one, other)


def test_momentum_is_started_only_where_it_is_missing_and_meant() -> None:
    weight, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([weight, frozen], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.full((2,), 7.0)
    start_momentum(optimizer)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full((2,), 7.0))
    assert "momentum_buffer" not in optimizer.state[frozen]
    for other in (
        torch.optim.SGD([weight], lr=0.1),
        torch.optim.SGD([weight], lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.Adam([weight], lr=0.1),
    ):
        start_momentum(other)
        assert not other.state


def test_the_guard_copies_one_dtype_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a foreach copy of mixed dtypes is a launch a tensor."""
    seen = []
    copy = torch._foreach_copy_

    def noted(targets: list[Tensor], sources: list[Tensor]) -> None:
        seen.append({t.dtype for t in (*targets, *sources)})
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    weight, count = torch.tensor([1.0, 2.0]), torch.tensor(3)
    guard = FiniteGuard([weight], [count])
    guard.before()
    weight.fill_(torch.nan)
    count.add_(1)
    assert all(len(dtypes) == 1 for dtypes in seen)
    assert len(seen) == 2
    guard.after([torch.tensor(0.0)], 1)
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))
    assert int(count) == 3
