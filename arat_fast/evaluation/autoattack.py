"""AutoAttack (Croce and Hein, ICML 2020) through the official code's packaged form, pyautoattack."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from arat_fast import reference
from arat_fast.errors import UserError
from arat_fast.evaluation.accuracy import batches, finite_logits
from arat_fast.evaluation.float32 import full_float32
from arat_fast.evaluation.record import write_json
from arat_fast.loaders.images import ImageSet

log = logging.getLogger(__name__)
OFFICIAL_ITERATIONS = 100
PAPER_ITERATIONS = 10  # what the ARAT paper's figures were made with; weaker than the official setting
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


class _Forward(logging.Handler):
    """Pass the library's stage messages to our log as progress."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message.startswith("robust accuracy after"):
            log.info("AutoAttack: %s", message)


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    logger = logging.getLogger("auto-attack")
    handler, level, propagate = _Forward(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def check_autoattack(num_classes: int, attacks: Sequence[str] = STANDARD) -> None:
    """Raise UserError where AutoAttack cannot run: without pyautoattack, or with too few classes."""
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        raise UserError("AutoAttack needs pyautoattack: pip install 'arat-fast[evaluation]'") from None
    if num_classes < 10 and any(name.endswith("-t") for name in attacks):
        raise UserError(
            f"AutoAttack's targeted attacks need 10 classes, the data has {num_classes}; use pgd instead"
        )


@full_float32(benchmark=False)  # of batches that shrink as images fall
def autoattack_correct(
    network: nn.Module,
    data: ImageSet,
    *,
    eps: float,
    norm: str = "Linf",
    iterations: int = OFFICIAL_ITERATIONS,
    attacks: Sequence[str] = STANDARD,
    queries: int = 5000,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device,
    state_file: Path | None = None,
) -> Tensor:
    """(N,) bool: still correct after every attack of AutoAttack, on the inference branch in eval mode.

    `iterations` is 100 and Square's `queries` 5,000 in the official standard version. With `state_file`, an
    evaluation that was cut short goes on where it stopped; the caller names the file after everything that
    the result depends on. Raises UserError when pyautoattack is not installed, the network has too few
    classes; TrainingError where its outputs are not finite.
    """
    check_autoattack(data.num_classes, attacks)
    from pyautoattack import AutoAttack

    verdicts = _finished(state_file)
    if len(verdicts) == len(data):
        return torch.tensor(verdicts, dtype=torch.bool)
    rest = data.take(np.arange(len(verdicts), len(data)))
    devices = [device] if device.type == "cuda" else []
    # The library seeds torch's global generators; the caller's stream must not notice.
    with (
        reference.attack_mode(network, "adv", batch_statistics=False),
        _quiet_library(),
        torch.random.fork_rng(devices),
        tqdm(total=len(data), initial=len(verdicts), unit="image", leave=False, disable=None) as bar,
    ):
        attack = AutoAttack(network, eps=eps, norm=norm, seed=seed, device=device, version="standard")
        attack.attacks_to_run = list(attacks)
        attack.fab.n_iter = iterations
        attack.square.n_queries = queries
        for apgd in (attack.apgd, attack.apgd_targeted):
            # The step-size schedule is set from n_iter in the constructor, so it follows here.
            apgd.n_iter = apgd.n_iter_orig = iterations
            apgd.n_iter_2 = max(int(0.22 * iterations), 1)
            apgd.n_iter_min = max(int(0.06 * iterations), 1)
            apgd.size_decr = max(int(0.03 * iterations), 1)
        for _, images, labels in batches(rest, batch_size, device):
            finite_logits(network, images)
            # The label that each image ended with: the true one where no attack succeeded.
            _, final = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
            verdicts += final.eq(labels).tolist()
            bar.update(len(labels))
            if state_file is not None:
                write_json(state_file, {"robust": verdicts})
    return torch.tensor(verdicts, dtype=torch.bool)


def _finished(state_file: Path | None) -> list[bool]:
    """Verdicts of an evaluation that was cut short; none where there is no file or a damaged one."""
    if state_file is None:
        return []
    state_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return [bool(v) for v in json.loads(state_file.read_text())["robust"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: AutoAttack starts again", state_file)
        return []
