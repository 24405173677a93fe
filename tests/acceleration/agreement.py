"""An accelerated model against its original: outputs, gradients, statistics, both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast.nn import use_branch

Output = Callable[[nn.Module, Tensor], Tensor]


def largest(tensors: Sequence[Tensor]) -> float:
    return max(float(t.detach().abs().max()) for t in tensors)


def assert_equal(
    accelerated: nn.Module, original: nn.Module, x: Tensor, tolerance: float, branches: int = 1
) -> None:
    """Train and eval mode. With several branches: a batch of one part a branch, against as many originals."""
    originals = [copy.deepcopy(original) for _ in range(branches)]
    parts = [(x + 0.1 * k).clamp(0, 1) for k in range(branches)]
    for training in (True, False):
        for model in (accelerated, *originals):
            model.train(training)
            model.zero_grad()
        if branches > 1:
            use_branch(accelerated, "both")
        outputs = []
        for model, part in zip(originals, parts, strict=True):
            torch.manual_seed(1)
            outputs.append(model(part))
        torch.manual_seed(1)
        output = accelerated(torch.cat(parts))
        expected = torch.cat(outputs)
        assert float((output - expected).detach().abs().max()) <= tolerance * largest([expected])
        output.square().mean().backward()
        expected.square().mean().backward()
        _assert_gradients(accelerated, originals, tolerance)
        for name, buffer in accelerated.named_buffers():
            for k, model in enumerate(originals):
                theirs = model.get_buffer(name)
                ours = buffer if buffer.shape == theirs.shape else buffer[k]
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def _assert_gradients(accelerated: nn.Module, originals: Sequence[nn.Module], tolerance: float) -> None:
    found = dict(accelerated.named_parameters())
    scale = largest([p.grad for p in originals[0].parameters() if p.grad is not None])
    for name, parameter in originals[0].named_parameters():
        each = [model.get_parameter(name).grad for model in originals]
        ours = found[name].grad
        if each[0] is None:
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, name
        stacked = ours.shape != parameter.shape
        theirs: Any = torch.stack(each) if stacked else sum(each)  # type: ignore[arg-type]
        assert float((ours - theirs).abs().max()) <= tolerance * scale, name
