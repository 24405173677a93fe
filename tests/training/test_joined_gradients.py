"""The pass that lets BatchNorm's backward add the gradients that meet in front of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from arat_fast import models
from arat_fast.nn import bn_mode, use_branch
from arat_fast.training.joined_gradients import JoinedGradients

OPS = torch.ops.arat_fast


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 8, 5, 5, generator=g).to(memory_format=torch.channels_last) for _ in range(4)]
    return images + [torch.rand(2, 8, generator=g) + 0.5 for _ in range(4)]


def backward(total: Tensor, x: Tensor, y: Tensor, *statistics: Tensor) -> tuple[Tensor, Tensor]:
    dx, g, _, _ = OPS.split_bn_batch_backward(total, x, y, True, *statistics, True, 1e-5)
    return dx, g


def rewritten(function: Callable[..., tuple[Tensor, ...]]) -> tuple[fx.GraphModule, int]:
    """(the traced function after the pass, how many backwards were joined)"""
    graph = make_fx(function, tracing_mode="fake")(*tensors())
    JoinedGradients()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    joined = graph.graph.find_nodes(op="call_function", target=OPS.split_bn_joined_backward.default)
    return graph, len(joined)


def test_a_sum_becomes_an_argument_and_the_values_stay() -> None:
    def function(a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return backward(a + b, *rest)

    graph, joined = rewritten(function)
    assert joined == 1
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    for found, expected in zip(graph(*tensors()), function(*tensors()), strict=True):
        assert torch.equal(found, expected)


OTHERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "read elsewhere too": lambda a, b, *rest: (lambda total: (*backward(total, *rest), total))(a + b),
    "scaled": lambda a, b, *rest: backward(torch.add(a, b, alpha=2), *rest),
    "broadcast": lambda a, b, *rest: backward(a + b[:, :1], *rest),
    "of a number": lambda a, _, *rest: backward(a + 1.0, *rest),
    "of another dtype": lambda a, b, *rest: backward(a + b.bfloat16(), *rest),
    "of another layout": lambda a, b, *rest: backward(a + b.contiguous(), *rest),
    "no sum": lambda a, b, *rest: backward(a * b, *rest),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_are_left_alone(name: str) -> None:
    graph, joined = rewritten(OTHERS[name])
    assert joined == 0
    for found, expected in zip(graph(*tensors()), OTHERS[name](*tensors()), strict=True):
        assert torch.equal(found, expected)


def test_a_compiled_input_gradient_joins_at_every_block_but_the_last() -> None:
    found: list[int] = []

    class Counting(JoinedGradients):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            target = OPS.split_bn_joined_backward.default
            found.append(len(graph.find_nodes(op="call_function", target=target)))

        def uuid(self) -> None:
            return None  # out of any cache

    torch.manual_seed(0)
    model = models.create_model("resnet8", 10, 3).to(memory_format=torch.channels_last)
    blocks = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) // 2

    def gradient(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(model(x).square().sum(), x)
        return g

    x = torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    options = {"post_grad_custom_post_pass": Counting()}
    with use_branch(model, "adv"), bn_mode(model, "batch", update=False):
        expected = gradient(x)
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled = torch.compile(gradient, fullgraph=True, dynamic=False, options=options)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-6)
    assert max(found) == blocks  # the stem's output and every block's but the last one's
