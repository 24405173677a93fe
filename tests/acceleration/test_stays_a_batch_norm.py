"""An accelerated BatchNorm is one to whatever knows BatchNorm: by class, parameters, attributes, pickles."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import own_models as own
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from arat_fast.acceleration import accelerate, revert
from arat_fast.nn import FoldedModel, convert_split_bn, use_branch
from arat_fast.nn.fused_batch_norm import FusedBatchNorm2d

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
BLOCKS = (own.Functional, own.PreActivation)


def pair(**options: Any) -> tuple[nn.Module, own.Network]:
    original = own.network(*BLOCKS)
    return accelerate(copy.deepcopy(original), **({"precision": "fp32"} | options)), original


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(optimizer.param_groups[0]["params"][0].dtype)), Y).backward()
        optimizer.step()


def assert_same_state(model: nn.Module, original: nn.Module) -> None:
    theirs = original.state_dict()
    assert list(model.state_dict()) == list(theirs)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_class_parameters_and_attributes() -> None:
    original = own.network(*BLOCKS)
    tensors = [*original.parameters(), *original.bn.buffers()]
    layers = list(original.modules())
    model = accelerate(original, precision="fp32")
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    now = [*model.parameters(), *model.bn.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert all(type(layer) is FusedBatchNorm2d and layer.weight.ndim == 1 for layer in norms(model))
    assert all(layer.affine and layer.track_running_stats for layer in norms(model))
    norms(model)[0].reset_running_stats()
    assert not norms(model)[0].running_mean.any()  # type: ignore[union-attr]
    revert(model)
    assert all(type(layer) is nn.BatchNorm2d for layer in norms(model))
    assert {k for layer in norms(model) for k in vars(layer)} == set(vars(nn.BatchNorm2d(2)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_built_before_or_after(when: str, precision: Any) -> None:
    original = own.network(*BLOCKS)
    model = copy.deepcopy(original)
    before = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    accelerate(model, precision=precision)
    optimizer = before if when == "before" else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer)
    if precision == "fp32":
        train(original, torch.optim.SGD(original.parameters(), 0.1, momentum=0.9))
        assert_same_state(model, original)
    else:
        assert not torch.equal(original.bn.weight, model.bn.weight)


def test_a_plain_run_goes_on_accelerated_and_back() -> None:
    """state_dict and the optimizer's momenta, in both directions."""
    model, original = (each.double() for each in pair())
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (original, model)]
    train(original, optimizers[0])
    expected = copy.deepcopy(original)
    last = torch.optim.SGD(expected.parameters(), 0.1, momentum=0.9)
    last.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train(expected, last)
    model.load_state_dict(original.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    train(model, optimizers[1])
    assert_same_state(model, expected)
    fresh = own.network(*BLOCKS).double()
    fresh.load_state_dict(model.state_dict())
    x = X.double()
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_averaged_weights_get_their_statistics() -> None:
    averaged = []
    for model in pair():
        average = AveragedModel(model)
        train(model, torch.optim.SGD(model.parameters(), 0.1))
        average.update_parameters(model)
        update_bn([X, X.flip(0) * 0.5], average)
        averaged.append(average)
    assert_same_state(*averaged)
    assert int(averaged[0].module.bn.num_batches_tracked) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: setattr(layer, "momentum", None),
        lambda layer: setattr(layer, "momentum", 1.0),
        lambda layer: layer.eval(),
        lambda layer: layer.requires_grad_(False).eval(),
        lambda layer: layer.double().float(),
        lambda layer: layer.register_parameter("weight", None) or layer.register_parameter("bias", None),
        lambda layer: [setattr(layer, name, None) for name in STATISTICS],
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_are_honoured(change: Callable[[nn.Module], Any], training: bool) -> None:
    model, original = pair()
    outputs = []
    for each in (model, original):
        each.train(training)
        for layer in norms(each):
            change(layer)
        for x in (X, X * 0.5, X.square()):
            output = each(x)
        output.square().mean().backward()
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert_same_state(model, original)
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3)


def test_parameters_of_other_dtypes() -> None:
    """`model.bfloat16()` after accelerate: by PyTorch."""
    model, original = pair()
    for each in (model, original):
        each.bfloat16().eval()
    torch.testing.assert_close(model(X.bfloat16()), original(X.bfloat16()), rtol=0.05, atol=0.05)


def test_layers_replaced_afterwards() -> None:
    """SyncBatchNorm takes neither residual nor relu; another activation is not clamped away."""
    model, original = pair()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == len(norms(original))
    torch.testing.assert_close(model.eval()(X), original.eval()(X), rtol=1e-4, atol=1e-5)
    model, original = pair()
    model.relu = original.relu = nn.Softplus()  # type: ignore[assignment]
    torch.testing.assert_close(model.eval()(X), original.eval()(X), rtol=1e-4, atol=1e-5)


def test_double_backward() -> None:
    gradients = []
    for each in pair():
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(each(x), Y), x, create_graph=True)
        gradient.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    scale = max(float(g.abs().max()) for g in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * scale)


def test_folding() -> None:
    model, original = pair()
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    original.load_state_dict(model.state_dict())
    folded = FoldedModel(model, None, X)
    assert folded.folded == FoldedModel(original, None, X).folded >= 3
    torch.testing.assert_close(folded.module(X), original.eval()(X), rtol=1e-4, atol=1e-5)


class Flattens(own.Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 2).view(len(x), -1)[:, : own.C])


class Scaled(own.Block):
    scales: tuple[float, ...] = (1.0,)

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.activated, self.path = 2.0, True, ["conv1"]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.path:
            x = self.bn1(getattr(self, name)(x))
        return (F.relu(x) if self.activated else x) * self.factor * self.scales[0]


def test_flattening_by_view() -> None:
    torch.manual_seed(0)
    original = Flattens(*(kind() for kind in BLOCKS))
    model = accelerate(copy.deepcopy(original), precision="fp32")
    with pytest.raises(RuntimeError, match="view size is not compatible") as caught:
        model(X)
    assert ".flatten(1)" in caught.value.__notes__[0]
    model = accelerate(revert(model), channels_last=False, precision="fp32")
    torch.testing.assert_close(model(X), original(X), rtol=1e-4, atol=1e-5)
    assert_same_state(model, original)
    last = X.contiguous(memory_format=torch.channels_last)
    assert model.bn(model.stem(last)).is_contiguous(memory_format=torch.channels_last)
    assert model.bn(model.stem(X)).is_contiguous()


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"split_bn": True}, {"channels_last": False}])
def test_whole_models_in_files(options: dict[str, Any]) -> None:
    model, _ = pair(**options)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    again, twin, shallow = copy.deepcopy(loaded), copy.deepcopy(model), copy.copy(model)
    for each in (loaded, again, twin, shallow):
        for ours, theirs in zip(each.modules(), model.modules(), strict=True):
            assert type(ours).__name__ == type(theirs).__name__
            assert ("_plain_class" in vars(type(ours))) == ("_plain_class" in vars(type(theirs)))
        assert torch.equal(each(X), model(X))
    revert(loaded)
    assert type(loaded) is own.Network
    assert not any("_traced" in vars(m) for m in loaded.modules())
    assert model.report.replaced  # type: ignore[union-attr]


def test_attributes_changed_afterwards() -> None:
    torch.manual_seed(0)
    original = own.Network(Scaled())
    model = accelerate(copy.deepcopy(original), precision="fp32")
    assert "blocks.0.bn1" in model.report.fused_relu  # type: ignore[union-attr]
    twin = copy.deepcopy(model)

    def agree(change: Callable[[Any], None]) -> None:
        for each in (model, original):
            change(each.blocks[0])
        torch.testing.assert_close(model.eval()(X), original.eval()(X), rtol=1e-4, atol=1e-5)

    calls: list[str] = []
    plain = type(model.blocks[0])._plain_class.forward  # type: ignore[attr-defined]
    agree(lambda block: setattr(block, "factor", 5.0))
    agree(lambda block: setattr(block, "activated", False))
    agree(lambda block: block.path.append("conv2"))
    agree(lambda block: setattr(block, "scales", (3.0,)))
    # A copy of the model as it was still runs fused.
    try:
        type(twin.blocks[0])._plain_class.forward = lambda *_: calls.append("plain")  # type: ignore[attr-defined]
        twin(X)
    finally:
        type(twin.blocks[0])._plain_class.forward = plain  # type: ignore[attr-defined]
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break; running statistics move."""
    whole = torch.compile
    options = {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda *args, **given: whole(*args, **given | options))
    torch.manual_seed(0)
    original = own.Network(own.Functional(), Scaled())
    model = accelerate(copy.deepcopy(original), precision=precision, compile=True)
    tolerance = 1e-3 if precision == "fp32" else 0.1
    for training in (True, False):
        ours, theirs = model.train(training)(X), original.train(training)(X)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not torch._dynamo.utils.counters["graph_break"]
    means = [each.get_buffer("bn.running_mean") for each in (model, original)]
    torch.testing.assert_close(*means, rtol=tolerance, atol=tolerance)
    model.train()(X).square().mean().backward()
    gradient = model.get_parameter("bn.weight").grad
    assert gradient is not None
    assert gradient.ndim == 1


def test_an_accelerated_network_can_be_split() -> None:
    """As `Trainer(model=accelerate(net))` does: the same as splitting the plain one."""
    model, original = pair()
    expected = convert_split_bn(original)
    split = convert_split_bn(model)
    with use_branch(split, "both"), use_branch(expected, "both"):
        torch.testing.assert_close(split(X), expected(X), rtol=1e-5, atol=1e-5)
    assert_same_state(split, expected)
