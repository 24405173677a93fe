"""SGD's momentum buffers before its first step, so that they can be guarded, captured and saved."""

from __future__ import annotations

import torch


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD zero buffers where it has none, which lead to the first step's momentum bit for bit.

    PyTorch's fused SGD allocates them uninitialised in its first step, and leaves them so where a gradient
    scaler skips that step. Other optimizers, and SGD with dampening, whose first step differs, are left
    alone.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
