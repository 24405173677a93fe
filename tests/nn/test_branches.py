"""Conversion of whole models: equal outputs, one shared choice, one statistics update, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import Block, small_model
from torch import nn

from arat_fast.nn import (
    SplitBatchNorm2d,
    bind_branches,
    bn_mode,
    convert_split_bn,
    revert_split_bn,
    use_branch,
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_equal_to_originals(split: nn.Module, originals: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Outputs, weight gradients and running statistics of a "both" batch against one original a branch.

    Deep networks in float64: in float32 a ReLU that rounding opens or closes moves gradients by 1 %.
    """
    use_branch(split, "both")
    parts = [x + 0.1 * k for k in range(len(originals))]
    y = split(torch.cat(parts))
    expected = [model(part) for model, part in zip(originals.values(), parts, strict=True)]
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-4, atol=1e-4)
    y.square().mean().backward()
    torch.cat(expected).square().mean().backward()
    weights = {name: p.grad for name, p in split.named_parameters() if p.ndim == 4}
    for name, gradient in weights.items():
        theirs = sum(dict(model.named_parameters())[name].grad for model in originals.values())
        error = (gradient - theirs).norm() / theirs.norm()  # type: ignore[union-attr,operator]
        assert error < 1e-3, name
    for k, model in enumerate(originals.values()):
        for name, value in model.named_buffers():
            found = dict(split.named_buffers())[name][k]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_two_branches_equal_two_models(x: torch.Tensor) -> None:
    model = small_model()
    originals = {name: copy.deepcopy(model) for name in ("clean", "adv")}
    assert convert_split_bn(model) is model
    assert_equal_to_originals(model, originals, x)


def test_torchvision_resnet18_per_branch() -> None:
    try:
        from arat_fast.loaders.torchvision_import import torchvision  # noqa: F401
    except ImportError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    original = resnet18(num_classes=10).double()
    split = convert_split_bn(copy.deepcopy(original))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    originals = {name: copy.deepcopy(original) for name in ("clean", "adv")}
    assert_equal_to_originals(split, originals, x)
    split.eval()
    for name, model in originals.items():
        use_branch(split, name)
        expected = model.eval()(x)
        torch.testing.assert_close(split(x), expected, rtol=1e-4, atol=1e-4)
        reverted = revert_split_bn(copy.deepcopy(split), name)
        torch.testing.assert_close(reverted(x), expected, rtol=1e-4, atol=1e-4)
        assert {n: v.shape for n, v in reverted.state_dict().items()} == {
            n: v.shape for n, v in original.state_dict().items()
        }


def test_a_choice_holds_as_a_call_and_ends_with_a_context(x: torch.Tensor) -> None:
    model = convert_split_bn(small_model())
    state = bind_branches(model)
    assert state.branch == "adv"
    use_branch(model, "clean")
    with use_branch(model, "both"), bn_mode(model, "batch", update=False):
        assert (state.branch, state.statistics, state.update) == ("both", "batch", False)
    assert (state.branch, state.statistics, state.update) == ("clean", "auto", True)
    with pytest.raises(RuntimeError), use_branch(model, "both"):
        raise RuntimeError
    assert state.branch == "clean"


def test_choosing_does_not_walk_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_split_bn(small_model())
    wrapper = nn.Sequential(nn.Identity(), model)
    use_branch(wrapper, "clean")  # the first call on a wrapper looks

    def walked(self: nn.Module) -> None:
        raise AssertionError("walked over the modules")

    monkeypatch.setattr(nn.Module, "modules", walked)
    use_branch(model, "both")
    bn_mode(wrapper, "running")
    assert bind_branches.__name__ == "bind_branches"


def test_one_foreach_update_a_forward(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_split_bn(small_model())
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.momentum = 0.1
    use_branch(model, "both")  # one branch is PyTorch's own on a CPU
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: (calls.append(len(a[0])), lerp(*a)))
    model(x)
    assert calls == [8]  # mean and variance of four layers
    model[1](model[0](x))  # a part of the model alone: each layer at once
    assert calls == [8, 2, 2]


def test_an_interrupted_forward_leaves_nothing_behind(x: torch.Tensor) -> None:
    model, twin = convert_split_bn(small_model()), convert_split_bn(small_model())
    for each in (model, twin):
        use_branch(each, "both")
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    last = model[5]
    model[5] = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        model(x)
    model[5] = last
    model(x)
    twin(x)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_copy_chooses_for_itself(x: torch.Tensor) -> None:
    model = convert_split_bn(small_model())
    twin = copy.deepcopy(model)
    use_branch(twin, "clean")
    assert bind_branches(model).branch == "adv"
    assert twin[1].bn1.state is twin[2].bn2.state is bind_branches(twin)
    before = model[1].bn1.running_mean.clone()
    twin(x)
    assert torch.equal(model[1].bn1.running_mean, before)
    assert not torch.equal(twin[1].bn1.running_mean, before)


def test_a_part_can_be_copied_again_and_again(x: torch.Tensor) -> None:
    model = convert_split_bn(small_model())
    part = copy.deepcopy(copy.deepcopy(model[:3]))
    use_branch(part, "clean")
    part(x)
    assert part[1].bn1.num_batches_tracked.tolist() == [1, 0]
    assert model[1].bn1.num_batches_tracked.tolist() == [0, 0]


def test_layers_built_by_hand_share_one_choice(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SplitBatchNorm2d(8), nn.Conv2d(8, 8, 3), SplitBatchNorm2d(8))
    model.to(memory_format=torch.channels_last)
    use_branch(model, "both")
    assert model[1].state is model[3].state
    model(x)
    assert model[3].num_batches_tracked.tolist() == [1, 1]


def test_revert_keeps_one_branch(x: torch.Tensor) -> None:
    model = convert_split_bn(small_model())
    use_branch(model, "both")
    model(torch.cat([x, x + 1]))
    model.eval()
    use_branch(model, "clean")
    expected = model(x)
    plain = revert_split_bn(model, "clean")
    assert plain is model
    assert type(plain[1].bn1) is nn.BatchNorm2d
    assert not plain._forward_hooks
    torch.testing.assert_close(plain(x), expected)
    convert_split_bn(plain)  # and back
    torch.testing.assert_close(plain(x), expected)


def test_conversion_keeps_what_the_layer_was() -> None:
    model = small_model().eval()
    model[1].bn1.requires_grad_(False)
    shared = model[2].bn1
    model[2].bn2 = shared
    convert_split_bn(model)
    assert not model[1].bn1.weight.requires_grad
    assert not model[1].bn1.training
    assert model[1].bn2.momentum == 0.3
    assert model[2].bn2 is model[2].bn1


def test_compiled_without_a_graph_break(x: torch.Tensor) -> None:
    """One graph a branch and mode; statistics move inside it; forward and backward as in eager mode."""
    eager = convert_split_bn(small_model())
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for branch, statistics in (("both", "batch"), ("adv", "running")):
        results = []
        for net in (eager, compiled):
            with use_branch(net, branch), bn_mode(net, statistics):
                leaf = x.clone().requires_grad_()
                y = net(leaf)
                results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(eager.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


class Subclass(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no nn.BatchNorm2d"),
        (lambda: nn.Sequential(Subclass(3)), "0 is a Subclass"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)), "1 has no affine"),
        (lambda: convert_split_bn(small_model()), "1.bn1 is split already"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3)),
            r"1 is a BatchNorm1d, .* \(N, C, 1, 1\)",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)),
            "1 is a SyncBatchNorm.*synchronise_bat",
        ),
    ],
)
def test_what_cannot_be_converted_is_named_and_left_alone(model: object, message: str) -> None:
    net = model()  # type: ignore[operator]
    before = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=message):
        convert_split_bn(net)
    assert [type(module) for module in net.modules()] == before


def test_models_without_split_bn_are_refused() -> None:
    for call in (lambda m: use_branch(m, "adv"), lambda m: revert_split_bn(m, "adv")):
        with pytest.raises(ValueError, match="no SplitBatchNorm2d"):
            call(Block(4))
    with pytest.raises(ValueError, match="branch is 'both'; expected one of"):
        revert_split_bn(convert_split_bn(Block(4)), "both")
