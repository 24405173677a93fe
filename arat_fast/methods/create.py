"""The method of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from arat_fast.config import TrainConfig
from arat_fast.errors import UserError, unknown_name
from arat_fast.methods.arat import ARAT
from arat_fast.methods.arrest import ARREST
from arat_fast.methods.at import AT
from arat_fast.methods.base import Method
from arat_fast.methods.emr import EMR
from arat_fast.methods.lbgat import LBGAT
from arat_fast.methods.mail import MAIL
from arat_fast.methods.mart import MART
from arat_fast.methods.standard import Standard
from arat_fast.methods.trades import TRADES
from arat_fast.models import create_model
from arat_fast.nn import SplitBatchNorm2d

METHODS = (
    "arat",
    "standard",
    "at",
    "trades",
    "mart",
    "mail-at",
    "mail-trades",
    "mail-mart",
    "lbgat",
    "arrest",
)


def branches_of(config: TrainConfig) -> tuple[str, ...]:
    """The BatchNorm branches that the method's network has."""
    return ("clean", "adv") if config.method == "arat" and config.arat.split_bn else ("adv",)


def create_method(
    config: TrainConfig,
    network: nn.Module,
    num_classes: int,
    channels: int,
    *,
    teacher: Mapping[str, torch.Tensor] | None = None,
) -> Method:
    """The configured method for `network`, with freshly drawn predictors or teacher where it has them.

    teacher: state_dict of arrest's, an ordinary network of the same model. Raises UserError for an unknown
    method or layer, arrest without a teacher, and EMR around a method without adversarial images.
    """
    method = _base(config, network, num_classes, channels, teacher)
    if not config.emr.coefficient:
        return method
    if not method.attacks:
        raise UserError(f"--emr.coefficient: method {config.method} has no adversarial images to regularise")
    return EMR(method, config.emr.coefficient, config.emr.temperature)


def _base(
    config: TrainConfig,
    network: nn.Module,
    num_classes: int,
    channels: int,
    teacher: Mapping[str, torch.Tensor] | None,
) -> Method:
    match config.method:
        case "arat":
            dims = _dims(config.arat.layers, network)
            if not dims and config.arat.invariance != "none":
                raise UserError(
                    "arat: the network names no invariance_layers; name BatchNorms with --arat.layers, "
                    "or choose --arat.invariance none"
                )
            return ARAT(config.arat, dims)
        case "standard":
            return Standard()
        case "at":
            return AT()
        case "trades":
            return TRADES(config.trades)
        case "mart":
            return MART(config.mart)
        case "mail-at":
            return MAIL("at", config.mail)
        case "mail-trades":
            return MAIL("trades", config.mail)
        case "mail-mart":
            return MAIL("mart", config.mail)
        case "lbgat":
            return LBGAT(config.lbgat, create_model(config.lbgat.teacher, num_classes, channels, ("adv",)))
        case "arrest":
            if teacher is None:
                raise UserError(
                    "method arrest needs --arrest.teacher: a run of an ordinarily trained network"
                )
            frozen = create_model(config.model, num_classes, channels, ("adv",))
            frozen.load_state_dict(dict(teacher))
            return ARREST(config.arrest, frozen)
    raise unknown_name("method", config.method, METHODS)


def _dims(chosen: Sequence[str], network: nn.Module) -> dict[str, int]:
    """Feature width of each layer to tap, in order; the network's own choice where none is given."""
    known = {n: m.num_features for n, m in network.named_modules() if isinstance(m, SplitBatchNorm2d)}
    layers: Sequence[str] = chosen or getattr(network, "invariance_layers", ())
    for name in layers:
        if name not in known:
            raise unknown_name("layer", name, known)
    return {name: known[name] for name in layers}
