"""How the passes of an iteration are compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._inductor.exc

from arat_fast.training.joined_gradients import JoinedGradients

# Of one piece of code in a process; torch's own is 8. Every network, batch size and dtype is a variant of
# the same two pieces, and one too many is an error here, where a graph must be whole.
RECOMPILE_LIMIT = 256
# What Inductor makes of an operator that it has no lowering for, as our own have none.
MISSING = ("MissingOperatorWithoutDecomp", "MissingOperatorWithDecomp")


def compiled_pass(function: Callable[..., Any], joined: bool = True) -> Callable[..., Any]:
    """`function` as one graph, compiled when first called, for the shapes it gets; call it in `tracing()`.

    joined: let the backward of BatchNorm add the gradients that meet in front of it (`JoinedGradients`).
    """
    name_fallbacks_only()
    options: dict[str, Any] = {"post_grad_custom_post_pass": JoinedGradients()} if joined else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def tracing() -> AbstractContextManager[object]:
    """The settings that calls of compiled passes need."""
    return torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=RECOMPILE_LIMIT)


@functools.cache
def name_fallbacks_only() -> None:
    """Spare a first compile the text of what flows into each operator without a lowering.

    PyTorch 2.11 writes it whether or not its log asks for it, and it holds the graph behind the operator: 85
    of the 140 CPU seconds in which the iteration of ResNet-18 compiles. 2.13 asks first. Where the log does
    ask, it gets the text as before. Does nothing where PyTorch has renamed what this replaces.
    """
    wanted = logging.getLogger("torch._inductor.graph")
    for name in MISSING:
        kind = getattr(torch._inductor.exc, name, None)
        whole = getattr(kind, "operator_str", None)
        if kind is None or whole is None:
            continue

        def brief(target: Any, *inputs: Any, whole: Callable[..., str] = whole) -> str:
            return whole(target, *inputs) if wanted.isEnabledFor(logging.INFO) else f"  target: {target}"

        kind.operator_str = staticmethod(brief)
