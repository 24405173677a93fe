"""SplitBatchNorm2d is one nn.BatchNorm2d a branch: values, gradients, running statistics, state_dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from arat_fast.nn import SplitBatchNorm2d, bn_mode, use_branch

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def pair(
    momentum: float | None = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[SplitBatchNorm2d, nn.ModuleDict]:
    split = SplitBatchNorm2d(8, momentum=momentum, dtype=dtype)
    plain = nn.ModuleDict({b: nn.BatchNorm2d(8, momentum=momentum, dtype=dtype) for b in split.branches})
    with torch.no_grad():
        for k, name in enumerate(split.branches):
            plain[name].weight.copy_(split.weight[k].uniform_(0.5, 1.5))
            plain[name].bias.copy_(split.bias[k].normal_())
    return split, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_equals_two_batch_norms(momentum: float | None, dtype: torch.dtype) -> None:
    split, plain = pair(momentum, dtype)
    for step in range(3):
        x = images(6, 8, 4, 5, seed=step, dtype=dtype)
        use_branch(split, "both")
        y = split(x)
        expected = torch.cat([plain["clean"](x[:3]), plain["adv"](x[3:])])
        torch.testing.assert_close(y, expected)
        use_branch(split, "adv")  # one more update of one branch
        torch.testing.assert_close(split(x), plain["adv"](x))
        for k, name in enumerate(split.branches):
            for buffer in BUFFERS:
                torch.testing.assert_close(getattr(split, buffer)[k], getattr(plain[name], buffer))
    split.eval()
    plain.eval()
    for name in split.branches:
        use_branch(split, name)
        torch.testing.assert_close(split(x), plain[name](x))
    before = {name: value.clone() for name, value in split.state_dict().items()}
    split(x)
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())


def test_gradients_equal_two_batch_norms() -> None:
    split, plain = pair()
    use_branch(split, "both")
    x, dy = images(6, 8, 4, 5), images(6, 8, 4, 5, seed=1)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    split(x1).backward(dy)
    torch.cat([plain["clean"](x2[:3]), plain["adv"](x2[3:])]).backward(dy)
    assert x1.grad is not None
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-5)
    for k, name in enumerate(split.branches):
        torch.testing.assert_close(split.weight.grad[k], plain[name].weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(split.bias.grad[k], plain[name].bias.grad, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_branch_gets_gradients_and_statistics() -> None:
    split, _ = pair()
    use_branch(split, "clean")
    before = copy.deepcopy(split.state_dict())
    split(images(4, 8, 3, 3)).square().sum().backward()
    assert split.weight.grad[0].count_nonzero()
    assert not split.weight.grad[1].count_nonzero()
    for buffer in BUFFERS:
        assert not torch.equal(getattr(split, buffer)[0], before[buffer][0])
        assert torch.equal(getattr(split, buffer)[1], before[buffer][1])


def test_bn_mode_is_apart_from_training() -> None:
    split, plain = pair()
    use_branch(split, "adv")
    x = images(4, 8, 3, 3)
    before = copy.deepcopy(split.state_dict())
    with bn_mode(split, "running"):
        torch.testing.assert_close(split(x), plain["adv"].eval()(x))
    with bn_mode(split.eval(), "batch", update=False):
        torch.testing.assert_close(split(x), plain["adv"].train()(x))
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())
    with bn_mode(split, "batch", update=True):
        split(x)
    torch.testing.assert_close(split.running_mean[1], plain["adv"].running_mean)
    assert split.state.statistics == "auto"


def test_residual_and_relu_are_the_composition() -> None:
    split, plain = pair()
    use_branch(split, "adv")
    x, r = images(4, 8, 3, 3), images(4, 8, 3, 3, seed=1)
    torch.testing.assert_close(split(x, residual=r, relu=True), torch.relu(plain["adv"](x) + r))


def test_one_branch_is_a_batch_norm() -> None:
    split, plain = SplitBatchNorm2d(8, branches=("only",)), nn.BatchNorm2d(8)
    x = images(4, 8, 3, 3)
    for branch in ("only", "both"):
        use_branch(split, branch)
        torch.testing.assert_close(split(x), plain(x))
    torch.testing.assert_close(split.running_var[0], plain.running_var)


def test_state_dict_is_plain_and_takes_a_batch_norm() -> None:
    split, plain = SplitBatchNorm2d(8), nn.BatchNorm2d(8)
    with torch.no_grad():
        plain.weight.normal_()
        plain(images(4, 8, 3, 3))
    assert {name: tuple(value.shape) for name, value in split.state_dict().items()} == {
        "weight": (2, 8),
        "bias": (2, 8),
        "running_mean": (2, 8),
        "running_var": (2, 8),
        "num_batches_tracked": (2,),
    }
    source = plain.state_dict()
    split.load_state_dict(source)
    assert source["weight"].shape == (8,)
    for k in range(2):
        assert torch.equal(split.weight[k], plain.weight)
        assert torch.equal(split.num_batches_tracked[k], plain.num_batches_tracked)
    again = SplitBatchNorm2d(8)
    again.load_state_dict(split.state_dict())
    assert torch.equal(again.running_mean, split.running_mean)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        SplitBatchNorm2d(9).load_state_dict(source)


def test_bfloat16_activations_with_fp32_parameters() -> None:
    split, _ = pair()
    use_branch(split, "both")
    y = split(images(4, 8, 3, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert split.running_mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, x: (use_branch(s, "both"), s(x[:3])), "x has a batch of 3"),
        (lambda s, x: s(x.contiguous()), "channels-last"),
        (lambda s, x: s(x[:1, :, :1, :1]), "one value a channel"),
        (lambda s, x: s(x[:, :5].contiguous(memory_format=torch.channels_last)), "weight has shape"),
        (lambda s, x: use_branch(s, "advers"), r"'advers'; expected one of \('clean', 'adv', 'both'\)"),
        (lambda s, x: bn_mode(s, "eval"), "statistics is 'eval'"),
        (lambda s, x: SplitBatchNorm2d(0), "num_features is 0"),
        (lambda s, x: SplitBatchNorm2d(8, branches=("adv", "adv")), "branches is"),
        (lambda s, x: SplitBatchNorm2d(8, branches=("clean", "both")), "branches is"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(SplitBatchNorm2d(8), images(4, 8, 3, 3))  # type: ignore[operator]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("branches", [("adv",), ("clean", "adv")])
def test_parts_equal_batches_one_after_the_other(branches: tuple[str, ...], momentum: float | None) -> None:
    """One batch of two parts: the values, gradients and running statistics of two forwards in turn."""
    whole = SplitBatchNorm2d(8, branches, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        whole.weight.uniform_(0.5, 1.5)
    apart = copy.deepcopy(whole)
    x = [images(3, 8, 4, 5, seed=s, dtype=torch.float64) for s in (0, 1)]
    with use_branch(whole, "adv", parts=2):
        y = whole(torch.cat(x).contiguous(memory_format=torch.channels_last), relu=True)
    use_branch(apart, "adv")
    expected = torch.cat([apart(part, relu=True) for part in x])
    torch.testing.assert_close(y, expected)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(whole.weight.grad, apart.weight.grad)
    torch.testing.assert_close(whole.bias.grad, apart.bias.grad)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(whole, name), getattr(apart, name))
    # Running statistics have no parts.
    with use_branch(whole, "adv", parts=2), bn_mode(whole, "running"):
        y = whole(x[0])
    with bn_mode(apart, "running"):
        torch.testing.assert_close(y, apart(x[0]))
    with pytest.raises(ValueError, match="parts is 2 of branch 'both'"):
        use_branch(whole, "both", parts=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("branches", [("adv",), ("clean", "adv")])
@pytest.mark.parametrize("residual", [False, True])
def test_pytorchs_own_batch_norm_on_a_cpu_equals_the_op(
    residual: bool, branches: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One branch in eager mode on a CPU runs PyTorch's kernel: the same values, gradients and statistics."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    layers = [SplitBatchNorm2d(8, branches, dtype=wide) for _ in range(2)]
    results = []
    for layer, suits in zip(layers, (True, False), strict=True):
        if not suits:
            monkeypatch.setattr(SplitBatchNorm2d, "_suits_pytorch", lambda *arguments: False)
        use_branch(layer, "adv")
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, layer.weight.numel()).view_as(layer.weight))
        x = images(6, 8, 4, 5, dtype=dtype).requires_grad_()
        other = images(6, 8, 4, 5, seed=7, dtype=dtype).requires_grad_() if residual else None
        y = layer(x, residual=other, relu=True)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        results[-1] += [] if other is None else [other.grad]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
