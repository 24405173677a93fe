"""One branch of a trained network as a network with single BatchNorms, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.errors import UserError
from arat_fast.evaluation.network import TrainedNetwork, load_run
from arat_fast.evaluation.record import sha256_of
from arat_fast.models.plain import plain_network
from arat_fast.models.weights import fit_weights, read_weights
from arat_fast.nn import single_branch
from arat_fast.nn.foreign import split_branches, under_our_names
from arat_fast.pixels import format_pixels

__all__ = ["BRANCHES", "PlainNetwork", "from_file", "from_run"]

BRANCHES = ("adv", "clean")


@dataclass(frozen=True)
class PlainNetwork:
    """A network with single BatchNorms and trained weights, in eval mode on the CPU.

    name: of the model. image_size: (height, width). branch: the BatchNorm branch it was, "adv" where there
    was one. about: provenance as text, for metadata. original: logits by the network that was exported, to
    check against. run: where it comes from a run.
    """

    model: nn.Module
    name: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    branch: str
    about: dict[str, str]
    original: Callable[[Tensor], Tensor]
    run: TrainedNetwork | None = None


def _plain_state(state: Mapping[str, Tensor], branch: str, wanted: nn.Module) -> dict[str, Tensor]:
    """The branch's entries under plain names. Raises UserError where there is no such branch."""
    stacked = under_our_names(state, wanted.state_dict().keys())
    if split_branches(stacked):
        return single_branch(stacked, branch)
    if branch != "adv":
        raise UserError(f"--branch {branch}: the network has single BatchNorms; leave --branch out")
    return stacked


def from_run(run: Path, weights: str = "auto", branch: str = "adv") -> PlainNetwork:
    """The plain network of a run. Raises UserError for what `load_run` does, or an absent branch."""
    trained = load_run(run, torch.device("cpu"), weights)
    height, width, channels = trained.checkpoint_state["image_shape"]
    classes = trained.checkpoint_state["num_classes"]
    config = trained.config
    model = plain_network(config.model, classes, channels, split_bn=False)
    model.load_state_dict(_plain_state(trained.network.state_dict(), branch, model))
    attack = config.attack
    about = {
        "method": config.method,
        "dataset": config.dataset,
        "trained_against": "nothing"
        if config.method == "standard"
        else f"{attack.norm} {format_pixels(attack.eps)}",
        "epochs": str(trained.epochs),
        "weights": trained.weights,
        "checkpoint_sha256": sha256_of(trained.checkpoint),
    }

    def original(images: Tensor) -> Tensor:
        reference.use_branch(trained.network, branch)
        logits: Tensor = trained.network(images)
        return logits

    return PlainNetwork(
        model.eval(), config.model, classes, channels, (height, width), branch, about, original, trained
    )


def from_file(
    path: Path, name: str, num_classes: int, in_channels: int, image_size: int, branch: str = "adv"
) -> PlainNetwork:
    """The plain network of a checkpoint file, ours or another program's.

    Raises UserError for an unknown model, and for a file that is unreadable or does not fit.
    """
    model = plain_network(name, num_classes, in_channels, split_bn=False)
    fit_weights(model, _plain_state(read_weights(path), branch, model), branch, str(path))
    about = {"checkpoint": path.name, "checkpoint_sha256": sha256_of(path)}
    return PlainNetwork(
        model.eval(), name, num_classes, in_channels, (image_size, image_size), branch, about, model
    )
