"""How the passes of an iteration are compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from arat_fast.training.joined_gradients import JoinedGradients

# Of one piece of code in a process; torch's own is 8. Every network, batch size and dtype is a variant of
# the same two pieces, and one too many is an error here, where a graph must be whole.
RECOMPILE_LIMIT = 256


def compiled_pass(function: Callable[..., Any], joined: bool = True) -> Callable[..., Any]:
    """`function` as one graph, compiled when first called, for the shapes it gets; call it in `tracing()`.

    joined: let the backward of BatchNorm add the gradients that meet in front of it (`JoinedGradients`).
    """
    options: dict[str, Any] = {"post_grad_custom_post_pass": JoinedGradients()} if joined else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def tracing() -> AbstractContextManager[object]:
    """The settings that calls of compiled passes need."""
    return torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=RECOMPILE_LIMIT)
