"""AutoAttack (Croce and Hein, ICML 2020) through the official code's packaged form, pyautoattack."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.errors import UserError
from arat_fast.evaluation.accuracy import batches
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
    classes, or the state file is damaged.
    """
    try:
        from pyautoattack import AutoAttack
        from pyautoattack.state import EvaluationState
    except ImportError:
        raise UserError("AutoAttack needs pyautoattack: pip install 'arat-fast[evaluation]'") from None
    if data.num_classes < 10 and any(name.endswith("-t") for name in attacks):
        raise UserError(
            f"AutoAttack's targeted attacks need 10 classes, the data has {data.num_classes}; use pgd instead"
        )
    parts = [(images, labels) for _, images, labels in batches(data, batch_size, device)]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    with reference.attack_mode(network, "adv", batch_statistics=False), _quiet_library():
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
        # Without a state file there is nowhere else that the library leaves its verdict per image.
        with _state_path(state_file) as path:
            _check_state(path)
            attack.run_standard_evaluation(images, labels, batch_size=batch_size, state_path=path)
            flags = EvaluationState.from_disk(path).robust_flags
    assert flags is not None
    return flags.cpu()


@contextlib.contextmanager
def _state_path(path: Path | None) -> Iterator[Path]:
    import tempfile

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "state.json"


def _check_state(path: Path) -> None:
    """A state file that a crash cut short must not look like an evaluation."""
    if not path.exists():
        return
    try:
        state = json.loads(path.read_text())
        started = state["_robust_flags"] is not None
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: AutoAttack starts again", path)
        started = False
    if not started:
        path.unlink()
