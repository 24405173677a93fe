"""What a run tells people while it trains: a line an epoch, and TensorBoard's events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arat_fast.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def summary_writer(folder: Path, first_epoch: int) -> SummaryWriter:
    """TensorBoard's writer; events of epochs that are trained again are purged. UserError where it is
    missing.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install 'arat-fast[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=first_epoch)


def describe(line: dict[str, Any], epochs: int) -> str:
    """One line for people of an epoch's metrics."""
    parts = [f"epoch {line['epoch']}/{epochs}", f"loss {line['loss']:.3f}"]
    parts += [
        f"{name.removeprefix('accuracy_')} {100 * value:.1f} %"
        for name, value in line.items()
        if name.startswith(("accuracy_", "validation_"))
    ]
    parts += [f"lr {line['learning_rate']:g}", f"{line['images_per_second']:.0f} images/s"]
    return "  ".join(parts)
