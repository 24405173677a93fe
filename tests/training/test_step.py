"""The fast iteration against the reference: the same losses, gradients, statistics and attack."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arat_fast import methods, reference
from arat_fast.config import ARATConfig, AttackConfig, TrainConfig
from arat_fast.evaluation.network import load_run
from arat_fast.loaders.images import ImageSet
from arat_fast.models import create_model
from arat_fast.models.cifar import ResNet, WideResNet
from arat_fast.nn import bind_branches, from_authors
from arat_fast.training.step import TrainStep
from arat_fast.training.trainer import Trainer

BOTH = ("clean", "adv")


def pair(kind: str, arat: ARATConfig, dtype: torch.dtype) -> tuple[reference.ARAT, nn.Module, methods.ARAT]:
    """A small network twice: the reference's and ours, with equal weights and predictors."""
    branches = BOTH if arat.split_bn else ("adv",)
    torch.manual_seed(0)
    ours: nn.Module
    if kind == "resnet":
        plain: nn.Module = reference.ResNet((8, 16), (1, 2), num_classes=10, split_bn=arat.split_bn)
        ours = ResNet((8, 16), (1, 2), num_classes=10, branches=branches)
    else:
        plain = reference.WideResNet(10, 1, num_classes=10, split_bn=arat.split_bn)
        ours = WideResNet(10, 1, num_classes=10, branches=branches)
    method = reference.ARAT(
        plain,
        gamma=arat.gamma,
        invariance=arat.invariance,
        use_predictor=arat.predictor,
        auto_balance=arat.auto_balance,
        distance=arat.distance,
    ).to(dtype)
    bind_branches(ours)
    ours.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = plain.state_dict()
    ours.load_state_dict(from_authors(state) if arat.split_bn else state)
    dims = {name: ours.get_submodule(name).num_features for name in ours.invariance_layers}  # type: ignore[union-attr]
    fast = methods.ARAT(arat, dims).to(dtype)  # type: ignore[arg-type]
    fast.predictors.load_state_dict(method.predictors.state_dict())
    method.a.fill_(0.4)
    fast.a.fill_(0.4)
    return method, ours, fast


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    parameters = [p for m in modules for p in m.parameters()]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def images(n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 10


def step_of(ours: nn.Module, fast: methods.Method, **options: Any) -> TrainStep:
    defaults: dict[str, Any] = {
        "attack": AttackConfig(steps=3, start="none"),
        "precision": "fp32",
        "compiled": False,
    }
    return TrainStep(ours, fast, sgd(ours, fast), **(defaults | options))


def assert_equal_state(plain: nn.Module, ours: nn.Module, split: bool, tolerance: float) -> None:
    state = plain.state_dict()
    state = from_authors(state) if split else state
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(
            value, state[name].reshape(value.shape), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("kind", ["resnet", "wide"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_bn": False},
        {"invariance": "none"},
        {"invariance": "symmetric"},
        {"invariance": "target-only"},
        {"invariance": "two-sided", "predictor": False},
        {"auto_balance": False, "distance": "mse"},
        {"distance": "kl"},
    ],
)
def test_three_iterations_equal_the_reference_in_float64(kind: str, options: dict[str, Any]) -> None:
    """Attack included: in float64 the signs of the gradients agree, so x_adv does, and with it everything."""
    arat = dataclasses.replace(ARATConfig(), **options)
    method, ours, fast = pair(kind, arat, torch.float64)
    step, optimizer = step_of(ours, fast), sgd(method)
    x, labels = images()
    for _ in range(3):
        expected = reference.train_step(method, optimizer, x, labels, steps=3, random=False)
        metrics = step(x, labels)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.to(metrics[name].dtype), rtol=1e-9, atol=1e-9)
    assert_equal_state(method.network, ours, arat.split_bn, 1e-9)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_attack_equals_the_references_in_float64(norm: str, bn: str) -> None:
    method, ours, fast = pair("resnet", ARATConfig(), torch.float64)
    x, labels = images()
    # Statistics that differ from 0 and 1, so that the running mode is a real one.
    method.network.train()
    for branch in BOTH:
        reference.use_branch(method.network, branch)
        method.network(x)
    ours.load_state_dict(from_authors(method.network.state_dict()))
    settings = {"eps": 128 / 255, "alpha": 32 / 255} if norm == "L2" else {"eps": 8 / 255, "alpha": 2 / 255}
    attack = AttackConfig(steps=4, start="none", norm=norm, bn=bn, **settings)  # type: ignore[arg-type]
    step = step_of(ours, fast, attack=attack)
    _, x_adv = step.attack(x.contiguous(memory_format=torch.channels_last), labels)
    expected = reference.pgd(
        method.network, x, labels, steps=4, norm=norm, batch_statistics=bn == "batch", **settings
    )
    torch.testing.assert_close(x_adv, expected, rtol=1e-9, atol=1e-9)
    assert_equal_state(method.network, ours, True, 1e-9)  # statistics moved alike, the clean ones not at all
    assert all(p.grad is None for p in ours.parameters())


def test_losses_and_gradients_in_fp32_given_the_same_adversarial_images() -> None:
    """Losses to 1e-5; gradients, of the median batch, as near to float64's as eager's are.

    Not of every batch: a ReLU whose argument changes sign by rounding moves gradients by up to 1e-3.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        exact, _, _ = pair("resnet", ARATConfig(), torch.float64)
        plain, ours, fast = pair("resnet", ARATConfig(), torch.float32)
        x, labels = images(16, torch.float32, seed)
        x_adv = (x + 0.02).clamp(0, 1)
        terms, _ = exact.train().loss(x.double(), x_adv.double(), labels)
        torch.stack(list(terms.values())).sum().backward()
        expected, _ = plain.train().loss(x, x_adv, labels)
        torch.stack(list(expected.values())).sum().backward()
        step = step_of(ours, fast)
        step.optimizer.zero_grad = lambda *args, **options: None  # type: ignore[method-assign]
        metrics = step(x, labels, x_adv=x_adv)
        for name, value in terms.items():
            torch.testing.assert_close(metrics[name].double(), value.detach(), rtol=1e-5, atol=0)
        true = from_authors_gradients(exact.network)
        eager = from_authors_gradients(plain.network)
        for name, parameter in ours.named_parameters():
            assert parameter.grad is not None
            scale = true[name].norm()
            pair_of = (parameter.grad, eager[name])
            both = tuple(float((g.double() - true[name]).norm() / scale) for g in pair_of)
            errors.setdefault(name, []).append(both)  # type: ignore[arg-type]
    for name, found in errors.items():
        error, yardstick = (sorted(values)[len(values) // 2] for values in zip(*found, strict=True))
        assert error <= 2 * yardstick + 2e-6, (name, error, yardstick)


def from_authors_gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients of the reference network by our names: branches stacked."""
    state = {name: b.detach() for name, b in network.named_buffers()}
    state |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return from_authors(state)


def test_bf16_gradients_are_as_good_as_eager_autocasts() -> None:
    """Error against float64 at most twice that of the reference under bf16 autocast, plus a hair."""
    arat = ARATConfig(gamma=3.0)
    x, labels = images(32, torch.float32)
    x_adv = (x + 0.02).clamp(0, 1)
    gradients = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.float32)):
        method, _, _ = pair("resnet", arat, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "eager"):
            terms, _ = method.train().loss(x.to(dtype), x_adv.to(dtype), labels)
        torch.stack([t.to(dtype) for t in terms.values()]).sum().backward()
        gradients[name] = from_authors_gradients(method.network)
    _, ours, fast = pair("resnet", arat, torch.float32)
    step_of(ours, fast, precision="bf16")(x, labels, x_adv=x_adv)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        exact = gradients["exact"][name]
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        yardstick = (gradients["eager"][name].double() - exact).norm() / exact.norm()
        assert error <= 2 * yardstick + 0.02, (name, float(error), float(yardstick))


@pytest.mark.parametrize("aliased", [False, True])
def test_start_is_counted_by_the_step_and_stays_in_the_ball(aliased: bool) -> None:
    _, ours, fast = pair("resnet", ARATConfig(), torch.float32)
    x, labels = images(6, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    step = step_of(ours, fast, attack=AttackConfig(steps=1, aliased_start=aliased))
    centre, first = step.attack(x, labels)
    step.step.add_(1)
    _, second = step.attack(x, labels)
    step.step.sub_(1)
    again, _ = step.attack(x, labels)
    assert not torch.equal(first, second)
    assert torch.equal(again, centre)
    assert torch.equal(centre, x) != aliased
    assert (first - centre).abs().max() <= 8 / 255 + 1e-6
    assert first.min() >= 0
    assert first.max() <= 1


def test_attack_graph_computes_no_weight_gradient() -> None:
    """Every convolution_backward of the compiled attack step asks for the input's gradient only."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    _, ours, fast = pair("resnet", ARATConfig(), torch.float32)
    step = step_of(ours, fast)
    step.attack.compiled_gradient = torch.compile(
        step.attack.gradient, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep)
    )
    x, labels = images(6, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    _, x_adv = step.attack(x, labels, compiled=True)
    masks = [
        tuple(node.args[-1])
        for graph in graphs
        for node in graph.graph.nodes
        if node.target == torch.ops.aten.convolution_backward.default
    ]
    assert len(masks) == sum(isinstance(m, nn.Conv2d) for m in ours.modules())
    assert set(masks) == {(True, False, False)}
    assert all(p.requires_grad for p in ours.parameters())
    _, plain, plain_method = pair("resnet", ARATConfig(), torch.float32)
    _, expected = step_of(plain, plain_method).attack(x, labels)
    torch.testing.assert_close(x_adv, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_iterations_equal_the_reference_and_compile_once() -> None:
    method, ours, fast = pair("resnet", ARATConfig(), torch.float64)
    step, optimizer = step_of(ours, fast, compiled=True), sgd(method)
    x, labels = images()
    for k in range(4):
        expected = reference.train_step(method, optimizer, x, labels, steps=3, random=False)
        metrics = step(x, labels)
        torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-9, atol=1e-9)
        if k == 0:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    # A partial last batch runs eagerly, to the same result.
    expected = reference.train_step(method, optimizer, x[:4], labels[:4], steps=3, random=False)
    metrics = step(x[:4], labels[:4])
    torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("method", ["arat", "standard"])
def test_a_run_on_the_fast_engine_resumes_and_evaluates(
    method: str, tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, engine="fast", method=method, validation=20)
    averaging = dataclasses.replace(config.averaging, swa_start=2, swa_every=2)
    config = dataclasses.replace(config, averaging=averaging)
    whole = Trainer(config, digits[0], tmp_path / "whole")
    whole.run()
    part = Trainer(dataclasses.replace(config, epochs=2), digits[0], tmp_path / "part")
    part.run()
    rest = Trainer(config, digits[0], tmp_path / "part", resume=True)
    rest.run()
    for a, b in zip(whole.engine.parameters(), rest.engine.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = whole.directory.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"]
    # What is saved is in the reference's names, and gives the same logits there.
    trained = load_run(tmp_path / "whole", torch.device("cpu"), "last")
    x = torch.from_numpy(digits[1].images[:20]).permute(0, 3, 1, 2).float() / 255
    whole.network.eval()
    torch.testing.assert_close(
        trained.network(x),
        whole.network(x.contiguous(memory_format=torch.channels_last)),
        rtol=1e-4,
        atol=1e-4,
    )
    assert load_run(tmp_path / "whole", torch.device("cpu")).weights == "swa"


def test_both_engines_start_from_the_same_weights(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    a, b = (
        Trainer(dataclasses.replace(tiny_config, engine=engine), digits[0], tmp_path / engine).engine.state()
        for engine in ("reference", "fast")
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].reshape(-1), b[name].reshape(-1)) for name in a)


def test_wrong_batches_and_models_are_refused_before_anything_changes() -> None:
    _, ours, fast = pair("resnet", ARATConfig(), torch.float32)
    step = step_of(ours, fast)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    x, labels = images(6, torch.float32)
    for wrong, message in [
        ((x.double(), labels), "torch.float64; expected uint8 with indices, or torch.float32"),
        ((x, labels[:3]), r"shape \(3,\); expected int64 \(6,\)"),
        ((x, labels.int()), "torch.int32"),
        ((torch.zeros(2, 8, 8, 3, dtype=torch.uint8), labels[:2]), "need indices"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(*wrong)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    single = create_model("resnet8", branches=("adv",))
    with pytest.raises(
        ValueError, match=r"ARAT uses the BatchNorm branches \('clean', 'adv'\); the model has"
    ):
        step_of(single, fast)
    with pytest.raises(ValueError, match="has no SplitBatchNorm2d"):
        step_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), methods.Standard())
    with pytest.raises(ValueError, match="1 is a BatchNorm1d"):
        step_of(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), methods.Standard())
    other = methods.ARAT(ARATConfig(), {"layer9.0.bn1": 8})
    with pytest.raises(ValueError, match="the model has no such layers"):
        step_of(ours, other)
