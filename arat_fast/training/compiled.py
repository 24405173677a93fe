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


def compiled_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one graph, compiled when first called, for the shapes it gets; call it in `tracing()`."""
    options = {"post_grad_custom_post_pass": JoinedGradients()}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def tracing() -> AbstractContextManager[object]:
    """The settings that calls of compiled passes need."""
    return torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=RECOMPILE_LIMIT)
