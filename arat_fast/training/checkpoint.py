"""Checkpoints: written whole or not at all, read without running anything they hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arat_fast.errors import TrainingError, UserError

FORMAT = 1
# Of every checkpoint; `Trainer.state_dict` says what each is.
ENTRIES = (
    *("config", "image_shape", "num_classes", "training_images", "method", "optimizer", "averages"),
    *("epoch", "batch", "sums", "images_seen", "seconds", "best_accuracy", "balance", "recalibrated", "seed"),
)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's default generators, which dropout draws from: the CPU's, and a GPU's of `device`."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave, as far as it fits the device."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, dicts and lists of them) to `path`, atomically.

    Written to a temporary name beside it, synced, then renamed: a crash or a full disk leaves the previous
    file good. Raises TrainingError when the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        )
        kept = "the previous checkpoint is intact" if path.exists() else "nothing was saved before it"
        raise TrainingError(
            f"cannot write {path}: {reason}; {kept}. Make room, then continue with --resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`.

    Raises UserError for a missing, truncated, foreign, newer or incomplete file.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}: is this a run directory, and did the run save anything yet?"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly anything, IndexError too
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} is not a readable checkpoint ({reason}); it is damaged or not one of ours: "
            "restore a copy, or train again"
        ) from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(
            f"{path} is a checkpoint of another program; expected one that `arat-fast train` wrote"
        )
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']!r}; this one reads {FORMAT}. Upgrade arat-fast"
        )
    if missing := [name for name in ENTRIES if name not in state]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: it was changed or is damaged; restore a copy, or train again"
        )
    return state
