"""The frozen teacher of a distillation run: the network of another run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arat_fast.config import TrainConfig
from arat_fast.errors import UserError
from arat_fast.evaluation.network import load_run


def load_teacher(config: TrainConfig, channels: int, num_classes: int) -> dict[str, Tensor] | None:
    """Weights of the network in the run `arrest.teacher`; None for a method without such a teacher.

    Raises UserError when there is no such run, or its network is not one for this data and model.
    """
    if config.method != "arrest":
        return None
    if config.arrest.teacher is None:
        raise UserError(
            "method arrest needs --arrest.teacher: the run of a standard-trained network (`arat-fast train "
            "--method standard` makes one)"
        )
    trained = load_run(Path(config.arrest.teacher), torch.device("cpu"))
    where = f"--arrest.teacher {trained.run}"
    model, state = trained.config.model, trained.checkpoint_state
    has = (model, state["num_classes"], state["image_shape"][2])
    if has != (config.model, num_classes, channels):
        raise UserError(
            f"{where}: its network is a {has[0]} of {has[1]} classes, {has[2]} channels; expected a "
            f"{config.model} of {num_classes} classes, {channels} channels, for the student starts from it"
        )
    if trained.config.method == "arat" and trained.config.arat.split_bn:
        raise UserError(f"{where}: its network has two BatchNorm branches; expected one (--method standard)")
    return trained.network.state_dict()
