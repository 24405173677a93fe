"""torchvision's and timm's networks: accelerated they compute the same, reverted they are the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from agreement import assert_equal
from torch import Tensor, nn

from arat_fast.acceleration import accelerate, revert
from arat_fast.attacks import PGD
from arat_fast.loaders.torchvision_import import torchvision
from arat_fast.nn import FoldedModel, use_branch

from torchvision import models  # isort: skip  after the import above has mended it


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(num_classes=10)


def resnet26() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("resnet26", num_classes=10)


BOTH = pytest.mark.parametrize("build", [resnet18, resnet26])
Build = Callable[[], nn.Module]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@BOTH
def test_one_branch_equals_the_original(build: Build, x: Tensor) -> None:
    original = build().double()
    model = accelerate(copy.deepcopy(original), precision="fp32")
    assert_equal(model, original, x, 1e-9)


@BOTH
def test_in_fp32(build: Build, x: Tensor) -> None:
    original = build()
    assert_equal(accelerate(copy.deepcopy(original), precision="fp32"), original, x.float(), 5e-3)


@pytest.mark.slow
@BOTH
def test_two_branches_equal_two_models(build: Build, x: Tensor) -> None:
    original = build().double()
    model = accelerate(copy.deepcopy(original), split_bn=True, precision="fp32")
    assert_equal(model, original, x, 1e-9, branches=2)


@BOTH
def test_everything_that_can_be_fused_is(build: Build) -> None:
    model = accelerate(build(), precision="fp32")
    report = model.report
    names = {name for name, _ in model.named_modules()}
    blocks = [name for name, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    last = "bn2" if build is resnet18 else "bn3"
    assert set(report.fused_add) == {f"{block}.{last}" for block in blocks}
    inner = ["bn1"] if build is resnet18 else ["bn1", "bn2"]
    assert set(report.fused_relu) == {"bn1", *(f"{b}.{bn}" for b in blocks for bn in (*inner, last))}
    assert set(report.replaced) >= set(report.fused_relu)
    assert set(report.replaced) <= names
    assert not report.skipped
    relus: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: relus.append(1))
    model(torch.rand(2, 3, 64, 64))
    assert not relus  # none runs on its own any more


@BOTH
@pytest.mark.parametrize("branch", [None, "clean"])
def test_reverted_weights_load_into_a_fresh_model(build: Build, branch: str | None, x: Tensor) -> None:
    original = build()
    parameters = list(original.parameters())
    model = accelerate(original, split_bn=True, precision="fp32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    use_branch(model, "both")
    model(torch.cat([x, x.flip(0)]).float()).square().mean().backward()
    optimizer.step()
    use_branch(model, branch or "adv")
    expected = model.eval()(x.float())
    assert revert(model, branch) is model
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        torch.testing.assert_close(each.eval()(x.float()), expected, rtol=1e-4, atol=1e-5)
        assert {type(m) for m in each.modules()} == {type(m) for m in build().modules()}
        assert not any("report" in vars(m) or m._forward_hooks for m in each.modules())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model.get_parameter("conv1.weight").is_contiguous()


def test_methods_and_class_stay(x: Tensor) -> None:
    timm = pytest.importorskip("timm")
    model = accelerate(resnet26(), precision="fp32")
    assert isinstance(model, timm.models.resnet.ResNet)
    features = model.eval().forward_features(x.float())
    assert features.shape == (4, 2048, 2, 2)
    model.reset_classifier(3)
    assert model(x.float()).shape == (4, 3)


def test_norm_with_activation_of_timm(x: Tensor) -> None:
    """BatchNormAct2d is BN and ReLU (fused) or BN and another activation (kept)."""
    timm = pytest.importorskip("timm")
    for name, fused in (("regnetx_002", True), ("mobilenetv3_small_050", False)):
        torch.manual_seed(0)
        original = timm.create_model(name, num_classes=10).double()
        model = accelerate(copy.deepcopy(original), precision="fp32")
        assert bool(model.report.fused_relu)
        assert (len(model.report.fused_relu) > len(model.report.replaced) / 2) is fused
        assert_equal(model, original, x, 1e-9)
        folded = FoldedModel(model, None, x)
        assert folded.folded > len(model.report.replaced) / 2
        torch.testing.assert_close(folded.module(x), model.eval()(x), rtol=1e-9, atol=1e-9)
        assert list(revert(model).state_dict()) == list(original.state_dict())
        assert {type(m) for m in model.modules()} == {type(m) for m in original.modules()}


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_vision_transformer(library: str) -> None:
    torch.manual_seed(0)
    if library == "torchvision":
        vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)
    else:
        timm = pytest.importorskip("timm")
        vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=10,
        )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)  # a classifier of zeros would pass anything
    x = torch.rand(4, 3, 32, 32)
    expected = vit.eval()(x)
    with pytest.raises(ValueError, match=r"has no nn\.BatchNorm2d to split; leave split_bn=False"):
        accelerate(vit, split_bn=True)
    model = accelerate(vit, precision="fp32")
    assert model.report.replaced == ()
    torch.testing.assert_close(model(x), expected)
    x_adv = PGD(model, steps=2)(x, torch.arange(4))
    assert float((x_adv - x).abs().max()) > 0.03
    half = accelerate(revert(model), precision="bf16")
    assert half(x).dtype == torch.float32
    assert 0 < float((half(x) - expected).detach().abs().max()) < 0.1 + 0.1 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by accelerate", "in a function"])
def test_compiled_whole(how: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break, and once; Inductor takes its time and is left out."""
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    original = resnet18()
    model = accelerate(copy.deepcopy(original), split_bn=True, precision="fp32", compile="by" in how)
    use_branch(model, "adv")
    counters = torch._dynamo.utils.counters
    forward = model if model.report.compiled else compiled(lambda images: model(images))
    torch.testing.assert_close(forward(x.float()), original(x.float()), rtol=1e-3, atol=1e-3)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (2 if model.report.compiled else 1)  # the update of the statistics is a graph of its own
    forward(x.float()).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert model.get_buffer("bn1.num_batches_tracked").tolist() == [0, 2]
    assert revert(model)._compiled_call_impl is None
