"""`arat-fast export`: a trained network for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from arat_fast.errors import UserError
from arat_fast.export import FORMATS, check_formats, from_file, from_run, write_export
from arat_fast.export.plain import PlainNetwork
from arat_fast.export.write import snippet


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained network as one with single BatchNorms, for programs without arat-fast.

    From a run, or from a checkpoint file: this program's, the ARAT authors', timm's with split BatchNorm, or
    a plain one. Each written network is read back and its logits compared.
    """

    source: tyro.conf.Positional[Path]
    """Folder of a run, or a checkpoint file (.pt, .pth, .safetensors) with --model."""
    weights: Literal["auto", "last", "best", "swa", "ema"] = "auto"
    """Which of a run's weights; auto: the SWA where the run has one, else last."""
    branch: Literal["adv", "clean"] = "adv"
    """BatchNorm branch; adv is the one of inference."""
    format: str = ",".join(FORMATS)
    """Comma-separated: safetensors (with a model.py), torch-export (.pt2), robustbench (.json)."""
    out: Path | None = None
    """Folder to write to; default: RUN/export, or FILE-export here."""
    model: str | None = None
    """Network of a checkpoint file."""
    num_classes: int = 10
    """Classes of a checkpoint file's network."""
    in_channels: int = 3
    """Channels of its images."""
    image_size: int = 32
    """Side of its images, in pixels."""


def _network(options: ExportOptions) -> PlainNetwork:
    if options.source.is_file():
        if options.model is None:
            raise UserError(f"{options.source} is a file: name its network with --model (and --num-classes)")
        for flag in ("num_classes", "in_channels", "image_size"):
            if (value := getattr(options, flag)) < 1:
                raise UserError(f"--{flag.replace('_', '-')} is {value}; expected at least 1")
        return from_file(
            options.source,
            options.model,
            options.num_classes,
            options.in_channels,
            options.image_size,
            options.branch,
        )
    if options.model is not None:
        raise UserError("--model is for checkpoint files; a run knows its network")
    return from_run(options.source, options.weights, options.branch)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(ExportOptions, args=list(arguments), prog="arat-fast export")
    formats = [name.strip() for name in options.format.split(",") if name.strip()]
    check_formats(formats)
    network = _network(options)
    source = options.source
    default = Path(f"{source.stem}-export") if source.is_file() else source / "export"
    out = options.out or default
    for path, difference in write_export(network, out, formats).items():
        print(f"{path}: logits differ from the original's by at most {difference:.1e}")
    if "robustbench" in formats:
        print(f"{out / 'robustbench.json'}")
    if set(formats) != {"robustbench"}:
        print(f"\nIn {out}:\n\n{snippet(network, formats)}")
    return 0
