"""The trained network of a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.training.build import build_network
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.directory import RunDirectory

WEIGHTS = ("auto", "last", "best", "swa", "ema")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the weights of a run, in eval mode, and where they came from."""

    network: nn.Module
    config: TrainConfig
    run: Path
    checkpoint: Path
    weights: str  # last, best, swa or ema
    epochs: int  # finished ones
    checkpoint_state: dict[str, Any]


def load_run(run: Path, device: torch.device, weights: str = "auto") -> TrainedNetwork:
    """Load a run's network: "last" weights, "best" by validation, or an average; auto: swa where the run has
    one.

    Raises UserError for a directory without a run or without such weights, and for an unreadable checkpoint.
    """
    directory = RunDirectory(run)
    config = directory.config()
    directory.check_network()
    path = directory.best if weights == "best" else directory.last
    state = load_checkpoint(path, device)
    available = [name for name in ("swa", "ema") if name in state["recalibrated"]]
    chosen = ("swa" if "swa" in available else "last") if weights == "auto" else weights
    if chosen in ("swa", "ema") and chosen not in available:
        raise UserError(
            f"{run} has no {chosen} weights (it has: {', '.join(['last', *available])}); averages are ready "
            "when the run is complete"
        )
    network = build_network(config, state["image_shape"][2], state["num_classes"])
    if chosen in available:
        values = state["recalibrated"][chosen]
    else:
        prefix = "network."
        values = {k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)}
    try:
        network.load_state_dict(values)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the network of {directory.config_file}: {first}") from None
    return TrainedNetwork(
        network.to(device).eval(), config, run, path, chosen, int(state["epoch"]) - 1, state
    )
