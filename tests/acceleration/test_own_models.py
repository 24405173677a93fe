"""Unknown networks: what is found, what is refused, and that either way nothing changes but the speed."""

from __future__ import annotations

import copy
import random
from typing import Any

import own_models as own
import pytest
import torch
from agreement import assert_equal
from torch import Tensor, nn

from arat_fast.acceleration import accelerate, revert
from arat_fast.attacks import PGD
from arat_fast.nn import FoldedModel, SplitBatchNorm2d, convert_split_bn, use_branch
from arat_fast.nn.fused_batch_norm import FusedBatchNorm2d
from arat_fast.training.precision import LowPrecisionTwin
from arat_fast.training.taps import TapHooks

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(*kinds: type[own.Block], **options: Any) -> tuple[nn.Module, own.Network]:
    original = own.network(*kinds).double()
    return accelerate(copy.deepcopy(original), **({"precision": "fp32"} | options)), original


@pytest.mark.parametrize("branches", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "relu", "add"),
    [
        (own.Functional, {"bn1", "bn2"}, {"bn2"}),
        (own.Methods, {"bn1", "side_bn"}, {"side_bn"}),
        (own.PreActivation, {"bn1", "bn2"}, set()),
        (own.AddOnly, set(), {"bn1"}),
        (own.Listed, {"norms.0", "norms.1"}, set()),
        (own.ReadTwice, set(), set()),
        (own.ReadBetween, set(), set()),
        (own.BroadcastResidual, {"bn1", "bn2"}, {"bn1", "bn2"}),
    ],
)
def test_patterns(kind: type[own.Block], relu: set[str], add: set[str], branches: int) -> None:
    names = ("one", "two", "three")[:branches]
    model, original = pair(kind, kind, split_bn=names or False)
    report = model.report
    assert set(report.fused_relu) == {"bn", *(f"blocks.{k}.{name}" for k in (0, 1) for name in relu)}
    assert set(report.fused_add) == {f"blocks.{k}.{name}" for k in (0, 1) for name in add}
    assert not report.skipped
    assert report.branches == names
    assert_equal(model, original, X, 1e-9, max(branches, 1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (own.BranchOnData, "control flow that torch.fx cannot follow"),
        (own.BranchOnTypes, "a branch on types"),
        (own.Draws, "random draws"),
        (own.TorchDraws, "random draws"),
        (own.Counts, "attributes set in the forward (steps)"),
        (own.Stores, "attributes set in the forward (kept)"),
        (own.WithoutGradient, "a context such as torch.no_grad"),
        (own.MakesTensor, "a tensor that is neither parameter nor buffer"),
        (own.AnyArguments, "a forward of any number of arguments"),
        (own.OtherNormsInTraining, "other BatchNorm calls in train than in eval mode"),
    ],
)
def test_forwards_left_alone(kind: type[own.Block], reason: str) -> None:
    random.seed(3)
    before, torch_before = random.getstate(), torch.get_rng_state()
    original = own.network(kind).double()
    torch.set_rng_state(torch_before)
    state = {k: v for k, v in vars(original.blocks[0]).items() if not k.startswith("_")}
    model = accelerate(copy.deepcopy(original), precision="fp32")
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert list(model.report.skipped) == ["blocks.0"]
    assert reason in model.report.skipped["blocks.0"]
    assert model.report.fused_relu == ("bn",)
    assert isinstance(model.get_submodule("blocks.0.bn1"), FusedBatchNorm2d)
    now = {k: v for k, v in vars(model.get_submodule("blocks.0")).items() if not k.startswith("_")}
    assert set(now) == set(state)
    assert now["steps"] == 0
    for training in (True, False):
        random.seed(5)
        expected = original.train(training)(X)
        random.seed(5)
        torch.testing.assert_close(model.train(training)(X), expected, rtol=0, atol=1e-9)


def test_a_buffer_changes_when_the_forward_runs_only() -> None:
    original = own.network(own.ChangesBuffer).double()
    model = accelerate(copy.deepcopy(original), precision="fp32")
    assert float(model.get_buffer("blocks.0.scale")[0, 0]) == 2
    for _ in range(2):
        torch.testing.assert_close(model.eval()(X), original.eval()(X), rtol=0, atol=1e-9)
    assert float(model.get_buffer("blocks.0.scale")[0, 0]) == 4


def test_train_and_eval_are_read_at_run_time() -> None:
    """F.dropout(x, p, self.training) and nn.Dropout; the block's flag alone counts for its forward."""
    model, original = pair(own.TwoModes)
    model.get_submodule("dropout").p = original.dropout.p = 0.5  # type: ignore[assignment]
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    original.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  dropout draws in memory order
    x = X.contiguous(memory_format=torch.channels_last)
    for training in (True, False, True):
        outputs = []
        for each in (model, original):
            each.train(training)
            torch.manual_seed(2)
            outputs.append(each(x))
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    again = [model(x), model(x)]
    assert not torch.equal(*again)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_optional_arguments_take_the_original_forward() -> None:
    model, original = pair(own.Methods)
    block, plain = model.get_submodule("blocks.0").eval(), original.blocks[0].eval()
    x = torch.rand(2, own.C, 8, 8, dtype=torch.float64)
    taps: dict[str, Tensor] = {}
    expected = plain(x, {}, shift=2.0)
    torch.testing.assert_close(block(x, taps, shift=2.0), expected, rtol=0, atol=1e-9)
    assert set(taps) == {"bn1"}
    torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(block(x=x), plain(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", ["bn1", "relu"])
def test_hooks_see_what_they_saw(at: str) -> None:
    original = own.network(own.Listed if at == "relu" else own.Functional).double().eval()
    seen: list[list[Tensor]] = [[], []]
    model = copy.deepcopy(original)
    for values, each in zip(seen, (original, model), strict=True):
        layer = each.get_submodule(f"blocks.0.{at}")
        handle = layer.register_forward_hook(lambda _m, _i, out, values=values: values.append(out.clone()))
    accelerate(model, precision="fp32")
    if at == "relu":
        assert model.report.fused_relu == ("bn",)
    original(X)
    model(X)
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    handle.remove()
    model(X)
    assert len(seen[0]) == len(seen[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_features_tapped_by_hooks(compiled: bool) -> None:
    """As the training step taps a stranger's layers: what BN alone gives, also where it adds and clamps."""
    model, original = pair(own.Functional)
    layers = ("blocks.0.bn1", "blocks.0.bn2")
    taps = TapHooks(model, layers)
    forward = torch.compile(taps, backend="aot_eager", fullgraph=True) if compiled else taps
    logits, features = forward(X)
    expected = {}
    for name in layers:
        original.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: expected.update({name: out.relu().mean((2, 3))})
        )
    torch.testing.assert_close(logits, original(X), rtol=0, atol=1e-9)
    for name in layers:
        torch.testing.assert_close(features[name], expected[name], rtol=0, atol=1e-9)


def test_hooks_on_blocks_and_layers_taken_out() -> None:
    model, original = pair(own.Functional, own.Functional)
    seen: list[Tensor] = []
    model.get_submodule("blocks.0").register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.eval()(X)
    assert len(seen) == 1
    stem = [model.get_submodule(name) for name in ("stem", "bn", "relu")]
    plain = [original.get_submodule(name) for name in ("stem", "bn", "relu")]
    x = X - 0.5
    out = nn.Sequential(*stem)(x)
    torch.testing.assert_close(out, nn.Sequential(*plain).eval()(x), rtol=0, atol=1e-9)


def test_equal_blocks_share_one_class() -> None:
    model, _ = pair(own.Functional, own.Functional)
    first, second = model.get_submodule("blocks.0"), model.get_submodule("blocks.1")
    assert type(first) is type(second) is not own.Functional
    assert isinstance(first, own.Functional)


def test_a_copy_is_a_model_of_its_own() -> None:
    model, original = pair(own.Functional, split_bn=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("blocks.0.bn1.weight").zero_()
    use_branch(twin, "clean")
    torch.testing.assert_close(model.eval()(X), original.eval()(X), rtol=0, atol=1e-9)
    assert not torch.equal(twin.eval()(X), model(X))
    revert(twin)
    assert isinstance(model.get_submodule("blocks.0.bn1"), SplitBatchNorm2d)


def test_with_folding_the_low_precision_twin_and_the_attack() -> None:
    """What the training step does with its networks."""
    model, original = pair(own.Functional, own.PreActivation, split_bn=True)
    folded = FoldedModel(model, "adv", X)
    assert folded.folded >= 3
    torch.testing.assert_close(folded.module(X), original.eval()(X), rtol=0, atol=1e-9)
    model.float()
    half = LowPrecisionTwin(model, torch.bfloat16).module.eval()
    assert half.get_parameter("blocks.0.conv1.weight").dtype == torch.bfloat16
    x, y = X.float(), torch.arange(4)
    for bn in ("running", "batch"):
        ours = PGD(model, steps=3, bn=bn, branch="adv", random_start=False, norm="L2", eps=0.3, alpha=0.1)  # type: ignore[arg-type]
        theirs = PGD(original.float(), steps=3, bn=bn, random_start=False, norm="L2", eps=0.3, alpha=0.1)  # type: ignore[arg-type]
        torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=0, atol=1e-4)


def test_bf16_returns_float32_and_keeps_statistics_in_float32() -> None:
    original = own.network(own.Functional, own.Functional)
    model = accelerate(copy.deepcopy(original), precision="bf16")
    dtypes: list[torch.dtype] = []
    model.get_submodule("blocks.0.conv1").register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    x = X.float()
    out, expected = model(x), original(x)
    assert dtypes == [torch.bfloat16]
    assert out.dtype == torch.float32
    assert 0 < float((out - expected).detach().abs().max()) < 0.1
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    buffers = dict(model.named_buffers())
    for name, value in original.named_buffers():
        assert buffers[name].dtype == value.dtype
        torch.testing.assert_close(buffers[name].reshape(value.shape), value, rtol=0.05, atol=0.05)
    assert model.report.precision == "bf16"


def test_a_residual_of_another_dtype() -> None:
    layer = accelerate(nn.Sequential(nn.BatchNorm2d(8)), precision="fp32")[0]
    x, residual = torch.randn(4, 8, 5, 5), torch.randn(4, 8, 5, 5, dtype=torch.float64)
    expected = torch.relu(nn.BatchNorm2d(8)(x) + residual)
    found = layer(x, residual=residual, relu=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"split_bn": True}, {"fused_bn": False}, {"channels_last": False}])
def test_each_choice_is_undone(options: dict[str, Any]) -> None:
    model, original = pair(own.Functional, **options)
    if options.get("fused_bn") is False:
        assert not model.report.replaced
    if options.get("channels_last") is False:
        assert model.get_parameter("blocks.0.conv1.weight").is_contiguous()
    assert "BatchNorms replaced" in str(model.report)
    torch.testing.assert_close(model.train()(X), original.train()(X), rtol=0, atol=1e-9)
    revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert model.get_parameter("blocks.0.conv1.weight").is_contiguous()
    again = accelerate(model, precision="fp32")
    torch.testing.assert_close(again.eval()(X), original.eval()(X), rtol=0, atol=1e-9)


def test_splitting_without_fusing() -> None:
    model, original = pair(own.Functional, split_bn=True, fused_bn=False)
    assert not model.report.fused_relu
    assert_equal(model, original, X, 1e-9, branches=2)


def test_frozen_parameters_modes_and_other_settings_survive() -> None:
    original = own.network(own.Functional)
    original.bn.requires_grad_(False).eval()
    original.bn.momentum, original.bn.eps = None, 1e-3
    model = accelerate(original, precision="fp32")
    layer = model.get_submodule("bn")
    assert isinstance(layer, FusedBatchNorm2d)
    assert not layer.weight.requires_grad
    assert not layer.training
    assert (layer.momentum, layer.eps) == (None, 1e-3)
    revert(model)
    assert not original.bn.weight.requires_grad
    assert not original.bn.training


def test_a_report_of_the_models_own_stays() -> None:
    model = own.network(own.Functional)
    model.report = "mine"  # type: ignore[assignment]
    accelerate(model, precision="fp32")
    assert model.report == "mine"
    assert revert(model).report == "mine"


class WithoutAffine(own.Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(own.C, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(x))


class Subclassed(nn.BatchNorm2d):
    pass


def test_layers_that_cannot_be_replaced_are_named() -> None:
    model = own.network(WithoutAffine)
    model.bn = Subclassed(own.C)
    model.blocks.append(nn.SyncBatchNorm(own.C))
    accelerate(model, precision="fp32")
    reasons = model.report.skipped  # type: ignore[union-attr]
    assert reasons["bn"] == "left as it is: a Subclassed, not nn.BatchNorm2d itself"
    assert "without affine parameters" in reasons["blocks.0.bn1"]
    assert reasons["blocks.1"] == "left as it is: a SyncBatchNorm"


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {"split_bn": True}, ValueError, "Linear has no nn.BatchNorm2d to split"),
        (lambda: own.network(WithoutAffine), {"split_bn": True}, ValueError, "blocks.0.bn1 cannot be split"),
        (own.network, {"precision": "bf61"}, ValueError, "unknown precision 'bf61': did you mean 'bf16'"),
        (lambda: own.network().double(), {"precision": "bf16"}, ValueError, "parameters are float64"),
        (own.network, {"split_bn": ("a", "a")}, ValueError, "expected different names"),
        (own.network, {"split_bn": ("both",)}, ValueError, "other than 'both'"),
        (lambda: nn.BatchNorm2d(3), {}, ValueError, "model is itself a BatchNorm2d"),
        (lambda: accelerate(own.network()), {}, ValueError, "accelerated already; revert it first"),
        (lambda: "resnet18", {}, TypeError, "model is a str; expected an nn.Module"),
        (lambda: convert_split_bn(own.network()), {"split_bn": True}, ValueError, "split already"),
    ],
)
def test_refusals_change_nothing(build: Any, options: Any, error: type[Exception], message: str) -> None:
    model = build()
    types = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        accelerate(model, **options)
    assert types == ([type(m) for m in model.modules()] if types else [])


def test_revert_refuses() -> None:
    with pytest.raises(ValueError, match="Network is not accelerated"):
        revert(own.network())
    model = accelerate(own.network(), split_bn=True)
    with pytest.raises(ValueError, match="branch is 'both'; expected one of"):
        revert(model, "both")
    assert isinstance(model.bn, SplitBatchNorm2d)
    with pytest.raises(ValueError, match="no BatchNorm was split"):
        revert(accelerate(nn.Linear(2, 2)), "adv")
