"""What a configuration is refused for before anything is built or written: of `Trainer` and `--dry-run`."""

from __future__ import annotations

import logging
import math

from arat_fast.config import TrainConfig, resolved, validated
from arat_fast.errors import UserError
from arat_fast.methods import branches_of
from arat_fast.pixels import format_pixels
from arat_fast.training.build import check_reference, pick_device

log = logging.getLogger(__name__)


def checked(config: TrainConfig) -> TrainConfig:
    """The configuration, validated and resolved, as a run records it.

    Raises UserError for values out of range and for those that do not go together, or not with this machine.
    """
    config = resolved(validated(config))
    pick_device(config.device)
    if config.engine == "reference":
        check_reference(config)
    branches = branches_of(config)
    if config.method != "standard" and config.attack.branch not in branches:
        raise UserError(
            f"--attack.branch {config.attack.branch}: the network of method {config.method} has the one "
            f"branch {branches[0]}; leave the flag out, or train arat with --arat.split-bn"
        )
    if config.method == "arrest" and config.arrest.teacher is None:
        raise UserError(
            "method arrest needs --arrest.teacher: the run of a standard-trained network (`arat-fast train "
            "--method standard` makes one)"
        )
    if config.averaging.swa_start > config.epochs:
        raise UserError(
            f"--averaging.swa-start {config.averaging.swa_start} is beyond the {config.epochs} epochs: "
            "nothing would be averaged. Start earlier, give more --epochs, or 0 for no average"
        )
    return config


def check_counts(config: TrainConfig, available: int) -> None:
    """Raise UserError where the split of `available` training images leaves none to train on, or a last
    batch of one; warn of a small last batch.
    """
    count = min(config.limit_train or available, available)
    if config.validation >= count:
        raise UserError(
            f"cannot hold out {config.validation} of {count} training images; give a smaller --validation"
        )
    count -= config.validation
    left = count % config.batch_size
    if 1 < left < config.batch_size // 4 and config.method != "standard":
        # An iteration's 11 updates of momentum 0.1 make 69 % of the statistics the last batch's.
        # Two images in it (1,154 digits, not 1,152) cost 11 points of PGD-20 accuracy.
        log.warning(
            "the last batch of an epoch has only %d images, and the adv branch's statistics follow it: "
            "choose another --batch-size or number of images",
            left,
        )
    if left == 1:
        raise UserError(
            f"{count} training images in batches of {config.batch_size} leave a last batch of one "
            "image, which BatchNorm cannot normalise; change --batch-size or --limit-train"
        )


def warn_of_radius(config: TrainConfig) -> None:
    """Say where the accuracy at the end is measured in another ball than the one trained in."""
    attack, evaluation = config.attack, config.evaluation
    # The published 0.031 means 8/255.
    same = attack.norm == evaluation.norm and math.isclose(attack.eps, evaluation.eps, rel_tol=0.02)
    if config.method == "standard" or same:
        return
    log.warning(
        "training attacks within %s %s (--attack.eps, --attack.norm), evaluation within %s %s "
        "(--evaluation.eps, --evaluation.norm): the robust accuracy is that of another ball",
        attack.norm, format_pixels(attack.eps), evaluation.norm, format_pixels(evaluation.eps),
    )  # fmt: skip
