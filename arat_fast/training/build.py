"""Network, method and optimizer of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from arat_fast import methods, reference
from arat_fast.config import TrainConfig, resolved
from arat_fast.errors import UserError, unknown_name
from arat_fast.models import create_model
from arat_fast.models.library import is_library_name
from arat_fast.models.plain import plain_network
from arat_fast.nn import from_authors
from arat_fast.training.momentum import start_momentum

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda". Raises UserError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or check `arat-fast env`")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def use_threads(count: int) -> None:
    """Let torch compute with `count` CPU threads; 0 leaves its choice."""
    if count:
        torch.set_num_threads(count)


def check_model(name: str) -> None:
    """Raise UserError with the nearest known name unless `name` is one of the reference's models."""
    if name not in reference.MODELS:
        raise unknown_name("model", name, reference.MODELS)


def build_network(config: TrainConfig, channels: int, num_classes: int) -> nn.Module:
    """The configured network with freshly drawn weights, which depend on the seed alone."""
    split_bn = config.method == "arat" and config.arat.split_bn
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return plain_network(config.model, num_classes, channels, split_bn)


def check_reference(config: TrainConfig) -> None:
    """Raise UserError for a method or an attack that only the fast engine has."""
    _check_reference_method(config)
    attack = resolved(config).attack
    for name, value, known in (("loss", attack.loss, "ce"), ("branch", attack.branch, "adv")):
        if value != known:
            raise UserError(f"--engine reference attacks with {name} {known}, not {value}: use --engine fast")
    if attack.start == "normal":
        raise UserError("--engine reference starts uniformly or at the image: use --engine fast")


def _check_reference_method(config: TrainConfig) -> None:
    if config.method not in ("arat", "standard") or config.emr.coefficient:
        what = "emr" if config.method in ("arat", "standard") else f"method {config.method}"
        raise UserError(f"--engine reference knows arat and standard, not {what}: use --engine fast")


def build_method(config: TrainConfig, network: nn.Module) -> reference.ARAT | reference.Standard:
    """The reference's training method around `network`; its predictors' weights depend on the seed alone.

    Raises UserError for methods that only the fast engine has.
    """
    _check_reference_method(config)
    if config.method == "standard":
        return reference.Standard(network)
    for layer in config.arat.layers:
        known = [n for n, m in network.named_modules() if hasattr(m, "num_features")]
        known = [n for n in known if not n.endswith((".clean", ".adv"))]
        if layer not in known:
            raise unknown_name("layer", layer, known)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        return reference.ARAT(
            network,
            gamma=config.arat.gamma,
            invariance=config.arat.invariance,
            use_predictor=config.arat.predictor,
            auto_balance=config.arat.auto_balance,
            distance=config.arat.distance,
            temperature=config.arat.temperature,
            layers=config.arat.layers,
        )


def build_fast(
    config: TrainConfig, channels: int, num_classes: int, teacher: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, methods.Method]:
    """Network and method of the fast path, with the reference's weights, seed for seed.

    teacher: weights of arrest's teacher and start of its student; without, to be loaded from a checkpoint.
    """
    if config.method.startswith("mail") and config.mail.start_epoch > config.epochs:
        log.warning(
            "mail.start_epoch %d is beyond the %d epochs: %s trains without its weights",
            config.mail.start_epoch, config.epochs, config.method,
        )  # fmt: skip
    if config.method == "arrest" and is_library_name(config.model):
        raise UserError(f"arrest compares what enters the classifier, which {config.model} does not hand out")
    start = dict(teacher or build_network(config, channels, num_classes).state_dict())
    branches = methods.branches_of(config)
    network = create_model(config.model, num_classes, channels, branches)
    network.load_state_dict(from_authors(start) if len(branches) > 1 else start)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        return network, methods.create_method(config, network, num_classes, channels, teacher=start)


def build_optimizer(
    config: TrainConfig, parameters: Sequence[nn.Parameter], fused: bool = False
) -> torch.optim.SGD:
    """SGD over the network and the predictors, weight decay on all, momentum buffers from the start."""
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    start_momentum(optimizer)
    return optimizer
