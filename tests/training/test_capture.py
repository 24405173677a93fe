"""The captured iteration: the same weights as the uncaptured one, and a warm-up that leaves no trace."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_fast import methods
from arat_fast.config import ARATConfig, AttackConfig
from arat_fast.models.cifar import ResNet
from arat_fast.nn import bind_branches
from arat_fast.training.capture import (
    CannotCapture,
    CudaGraph,
    held_by_an_older_graph,
    make_capturable,
)
from arat_fast.training.step import TrainStep


class ReplayedByHand:
    """A graph for machines without CUDA: a replay runs the recorded body again."""

    def __init__(self, beside: object = None) -> None:
        self.beside, self.replays = beside, 0

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def record(self, body: Callable[[], None]) -> None:
        self.body = body

    def replay(self) -> None:
        self.replays += 1
        self.body()


class FailsToRecord(ReplayedByHand):
    """As PyTorch does: ending the capture fails too, and hides what broke it off."""

    def record(self, body: Callable[[], None]) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def build(device: str, *, fused: bool = True, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = ResNet((8, 16), (1, 1), num_classes=10)
    bind_branches(model)
    dims = {name: model.get_submodule(name).num_features for name in model.invariance_layers}
    method = methods.ARAT(ARATConfig(), dims)  # type: ignore[arg-type]
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.to(device)
    parameters = [*model.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=fused)
    defaults = {"attack": AttackConfig(steps=2), "precision": "fp32", "compiled": False, "padding": 1}
    return TrainStep(model, method, optimizer, **(defaults | options))


def captured(step: TrainStep, graph: type[ReplayedByHand] = ReplayedByHand) -> TrainStep:
    step._capture, step._make_graph = True, graph
    return step


def snapshot(step: TrainStep) -> list[Tensor]:
    return [t.detach().clone() for t in step.state()]


def dataset(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (22, 12, 12, 3), dtype=torch.uint8, generator=generator)
    return images.to(device), (torch.arange(22) % 10).to(device)


def train(step: TrainStep, device: str, resident: bool, rate: float = 0.1) -> list[dict[str, float]]:
    """Two epochs of two whole batches and a partial one, with a drop of the learning rate between."""
    images, labels = dataset(device)
    seen = []
    for epoch in (1, 2):
        for group in step.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate / epoch)
            else:
                group["lr"] = rate / epoch
        for k, rows in enumerate((torch.arange(8), torch.arange(8, 16), torch.arange(16, 22))):
            rows = rows.to(device)
            step.seek(epoch, epoch * 3 + k)
            batch = images if resident else images[rows]
            metrics = step(batch, labels[rows], rows, resident=resident)
            seen.append({name: float(value) for name, value in metrics.items()})
    return seen


def assert_same_training(device: str, resident: bool, one: TrainStep, other: TrainStep) -> None:
    # The learning rate is a double on the host and a float in the graph: 1e-7, not bit for bit.
    for a, b in zip(train(one, device, resident), train(other, device, resident), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for a, b in zip(snapshot(one), snapshot(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("guard", [False, True])
def test_replays_train_as_plain_iterations_do(resident: bool, guard: bool) -> None:
    plain, graph = build("cpu", guard=guard), captured(build("cpu", guard=guard))
    assert_same_training("cpu", resident, plain, graph)
    # Whole batches and the last one of an epoch, each with a graph of its own.
    assert [captured.graph.replays for captured in graph.captured] == [4, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("searches", [False, True])
def test_algorithms_are_searched_for_whole_batches_only(
    captures: bool, searches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searches)
    step = build("cpu", batch_size=8)
    seen = set()
    step.model.register_forward_pre_hook(
        lambda _, inputs: seen.add((len(inputs[0]), torch.backends.cudnn.benchmark))
    )
    step = captured(step) if captures else step
    images, labels = dataset("cpu")
    for rows in (torch.arange(16, 22), torch.arange(8)):  # a resumed run may begin with the last one
        step(images[rows], labels[rows], rows)
    # One branch in the attack, both in the training pass.
    # Two images: the first look.
    assert seen == {(2, False), (6, False), (12, False), (8, searches), (16, searches)}
    assert torch.backends.cudnn.benchmark == searches


@pytest.mark.parametrize("graph", [ReplayedByHand, FailsToRecord])
def test_warm_up_leaves_no_trace(
    graph: type[ReplayedByHand], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, statistics, counters and restored momentum as before; momentum that it made is zero."""
    step = captured(build("cpu"), graph)
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    monkeypatch.setattr(ReplayedByHand, "replay", lambda self: None)
    before = snapshot(step)
    with caplog.at_level(logging.WARNING):
        step._try_capture((images[rows], labels[rows], rows), resident=False)
    after = snapshot(step)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert momenta
    assert not any(bool(m.any()) for m in momenta)
    if graph is FailsToRecord:
        assert not step.captured
        assert (
            "training without a CUDA graph: capture failed: "
            "operation not permitted when stream is capturing; "
            "then operation failed due to a previous error during capture\n" in caplog.text
        )
    momenta[0].fill_(3.0)
    step._try_capture((images[rows], labels[rows], rows), resident=False)
    assert bool((momenta[0] == 3).all())


class LooksForOlderGraphs(ReplayedByHand):
    """Asks, where CUDA would record, what would break that off."""

    model: torch.nn.Module

    def record(self, body: Callable[[], None]) -> None:
        super().record(body)
        self.held = held_by_an_older_graph(self.model.parameters())


def test_nothing_of_its_own_holds_on_to_an_older_graph_while_recording() -> None:
    step = captured(build("cpu"), LooksForOlderGraphs)
    LooksForOlderGraphs.model = step.model
    images, labels = dataset("cpu")
    step(images[:8], labels[:8], torch.arange(8))
    assert step.captured[0].graph.held is False  # type: ignore[attr-defined]


def test_a_loss_that_is_still_referenced_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    kept = [p.square().sum() for p in step.model.parameters()][-1]
    with caplog.at_level(logging.WARNING):
        step(images[:8], labels[:8], torch.arange(8))
    assert "training without a CUDA graph: a loss or an output of the model" in caplog.text
    assert not step.captured
    assert kept.requires_grad


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_process_as_it_was() -> None:
    graph, stream, collects = CudaGraph(), torch.cuda.current_stream(), gc.isenabled()
    with pytest.raises(RuntimeError):
        graph.record(lambda: print(torch.rand(3, device="cuda").sum().item()))  # waits for the device
    assert torch.cuda.current_stream() == stream
    assert gc.isenabled() == collects
    assert bool((torch.rand(3, device="cuda") < 1).all())
    # The allocator's too: what the capture had, and what is cached, can be given back.
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError):
        CudaGraph().record(lambda: print(torch.ones(1 << 26, device="cuda").sum().item()))
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    again, out = CudaGraph(), torch.zeros(3, device="cuda")

    def body() -> None:
        out.uniform_().add_(1)

    again.record(body)
    again.replay()
    assert bool((out >= 1).all())


@pytest.mark.gpu
def test_a_warm_up_that_fails_is_waited_for() -> None:
    graph, big = CudaGraph(), torch.zeros(1 << 28, device="cuda")

    def fail() -> None:
        for _ in range(20):
            big.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), graph.side_stream():
        fail()
    assert float(big[-1]) == 20


def test_an_optimizer_that_cannot_be_captured_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    plain, fallen = build("cpu", fused=False), captured(build("cpu", fused=False))
    with caplog.at_level(logging.WARNING):
        assert_same_training("cpu", False, plain, fallen)
    assert caplog.text.count("training without a CUDA graph: SGD reads its learning rate on the host") == 1
    assert not fallen.captured


@pytest.mark.parametrize("change", ["moved weights", "a setting"])
def test_what_a_graph_would_not_see_is_recorded_anew(change: str) -> None:
    step, plain = captured(build("cpu")), build("cpu")
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    for k in range(4):
        if k == 2:
            recorded = step.captured[0]
            for model in (step.model, plain.model):
                if change == "a setting":
                    model.bn1.momentum = 0.5
                else:
                    model.linear.weight.data = model.linear.weight.data * 2
        ours, theirs = (s(images[rows], labels[rows], rows) for s in (step, plain))
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert step.captured[0] is not recorded
    for one, other in zip(step.state(), plain.state(), strict=True):
        assert torch.equal(one, other)


def test_a_learning_rate_that_is_a_tensor_is_obeyed() -> None:
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    step(images[rows], labels[rows], rows)
    rate = step.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    rate.fill_(0.0)
    before = [p.clone() for p in step.model.parameters()]
    step(images[rows], labels[rows], rows)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_learning_rate_set_by_hand_is_obeyed() -> None:
    """As TRADES and robust_overfitting do it, in batches of both graphs' sizes and of a third."""
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    for count in (8, 6):  # the second recording finds a number
        rows = torch.arange(count)
        (group,) = step.optimizer.param_groups
        group["lr"] = 0.01
        step(images[rows], labels[rows], rows)
    rate = step._recorded._recorded[0][0]  # type: ignore[union-attr]
    for count in (8, 6, 5):
        rows = torch.arange(count)
        for lr in (0.0, torch.zeros(())):
            group["lr"] = lr
            before = [p.clone() for p in step.model.parameters()]
            step(images[rows], labels[rows], rows)
            assert group["lr"] is rate
            assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
        group["lr"] = 0.3
        step(images[rows], labels[rows], rows)
        assert not all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_what_a_recorded_optimizer_would_not_see_is_refused() -> None:
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    (group,) = step.optimizer.param_groups
    group["weight_decay"] = 1e-3  # not recorded yet
    step(images[rows], labels[rows], rows)
    before = snapshot(step)
    for name, value in {"weight_decay": 0.0, "momentum": 0.5, "nesterov": True}.items():
        kept, group[name] = group[name], value
        with pytest.raises(ValueError, match=f"optimizer's {name} is {value}; .* capture=False"):
            step(images[rows], labels[rows], rows)
        group[name] = kept
    parameter = next(step.model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad of a parameter is not"):
        step(images[rows], labels[rows], rows)
    parameter.requires_grad_(True)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))
    step(images[rows], labels[rows], rows)
    step.optimizer.load_state_dict(step.optimizer.state_dict())
    with pytest.raises(ValueError, match="load_state_dict, add_param_group"):
        step(images[rows], labels[rows], rows)


def test_groups_that_were_given_one_tensor_as_rate_keep_their_own() -> None:
    step = build("cpu")
    first, *others = step.optimizer.param_groups[0]["params"]
    groups = [{"params": [first]}, {"params": others}]
    step.optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.1), momentum=0.9, fused=True)
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    captured(step)(images[rows], labels[rows], rows)
    one, other = step.optimizer.param_groups
    one["lr"] = 0.5
    step(images[rows], labels[rows], rows)
    assert [float(one["lr"]), float(other["lr"])] == pytest.approx([0.5, 0.1])
    one["lr"], other["lr"] = other["lr"], one["lr"]  # each is read before either is written
    step(images[rows], labels[rows], rows)
    assert [float(one["lr"]), float(other["lr"])] == pytest.approx([0.1, 0.5])


def test_a_change_of_mode_is_recorded_anew_also_after_a_size_that_failed() -> None:
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    step(images[rows], labels[rows], rows)
    (first,) = step.captured
    step._make_graph = lambda beside: FailsToRecord()
    step(images[:6], labels[:6], rows[:6])
    assert step.captured == [first]
    step._make_graph = lambda beside: ReplayedByHand()
    step.model.eval()
    step.optimizer.param_groups[0]["weight_decay"] = 0.0  # nothing recorded holds for it
    step(images[rows], labels[rows], rows)
    (second,) = step.captured
    assert second is not first
    step(images[rows], labels[rows], rows)
    assert step.captured == [second]


def test_wrong_batches_are_refused_and_other_sizes_run_outside() -> None:
    step = captured(build("cpu"))
    images, labels = dataset("cpu")
    rows = torch.arange(8)
    step(images[rows], labels[rows], rows)
    before = snapshot(step)
    with pytest.raises(ValueError, match=r"torch.int32 of shape \(8,\); expected int64 \(8,\)"):
        step(images[rows], labels[rows].int(), rows)
    with pytest.raises(ValueError, match=r"expected int64 \(8,\)"):
        step(images, labels[:4], rows, resident=True)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))
    for count in (6, 5, 5):
        step(images[:count], labels[:count], rows[:count])
    assert [captured.graph.replays for captured in step.captured] == [1, 1]  # type: ignore[attr-defined]


def test_a_second_size_that_cannot_be_captured_leaves_the_first_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, step = build("cpu"), captured(build("cpu"))
    step._make_graph = lambda beside: ReplayedByHand() if beside is None else FailsToRecord()
    with caplog.at_level(logging.WARNING):
        assert_same_training("cpu", False, plain, step)
    assert caplog.text.count("batches of 6 images without a CUDA graph: capture failed") == 1
    assert [captured.graph.replays for captured in step.captured] == [4]  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("resident", [False, True])
def test_cuda_graph_trains_as_plain_iterations_do(
    precision: str, resident: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Signs of PGD amplify what TF32 and other algorithms round otherwise, the more the larger the steps: at a
    # rate of 0.1 noise of 1e-7 in the convolutions becomes 4e-3 to 8e-2 of the loss in six iterations.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    plain = build("cuda", capture=False, precision=precision)
    graph = build("cuda", guard=True, precision=precision, compiled=compiled)
    first, second = (train(step, "cuda", resident, rate=0.003) for step in (plain, graph))
    assert len(graph.captured) == 2
    tolerance = 1e-2 if precision == "fp32" else 5e-2
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    assert float(graph.step) == float(plain.step)


def test_what_cannot_be_captured_is_refused_before_anything_changes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    for optimizer in (
        torch.optim.SGD([parameter], lr=0.1),
        torch.optim.Adam([parameter], lr=0.1, fused=True),
        torch.optim.Adam([parameter], lr=0.1),
    ):
        with pytest.raises(CannotCapture, match="learning rate on the host"):
            make_capturable(optimizer, torch.device("cpu"))
        assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer = torch.optim.Adam([parameter], lr=0.1, capturable=True)
    make_capturable(optimizer, torch.device("cpu"))
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


@pytest.mark.gpu
def test_cuda_warm_up_restores_and_a_replay_is_one_launch_without_synchronisation() -> None:
    step = build("cuda", guard=True)
    images, labels = dataset("cuda")
    rows = torch.arange(8, device="cuda")
    step._begin()
    before = snapshot(step)
    step._try_capture((images[rows], labels[rows], rows), resident=False)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=False))
    batch, of_batch = images[rows], labels[rows]
    step(batch, of_batch, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profile:  # on a GPU of CUDA's calls too
            step(batch, of_batch, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = {e.key: e.count for e in profile.key_averages() if e.key.startswith("cu")}
    assert launches.get("cudaGraphLaunch") == 1
    assert not [name for name in launches if "LaunchKernel" in name]  # Triton's are cuLaunchKernelEx
    assert launches.get("cudaMemcpyAsync", 0) <= 3  # images, labels and indices into their buffers
    assert "cudaStreamSynchronize" not in launches  # the profiler itself waits for the device when it ends
