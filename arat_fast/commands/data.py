"""`arat-fast data`: write `.beton` files from any data set, and check or describe them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from arat_fast.errors import UserError
from arat_fast.loaders import sources
from arat_fast.loaders.beton import RAW, checksum_path, inspect
from arat_fast.loaders.beton_write import Encoding, write_beton
from arat_fast.loaders.images import ImageSource


@dataclass(frozen=True)
class Prepare:
    """Write a data set's training and test images as .beton files, which FFCV reads.

    `arat-fast train --data-root OUT --loader ffcv` then trains from them.
    """

    dataset: str = "cifar10"
    """Data set: cifar10, cifar100, svhn, tiny-imagenet, imagenette, folder."""
    data_root: str | None = None
    """Folder of the original files."""
    out: Path = Path("data/beton")
    """Folder that the files are written to."""
    mode: Literal["auto", "raw", "jpeg", "mixed"] = "auto"
    """How images are stored; auto: raw (exact) for images of one size, jpeg for photos. mixed: some
    photos raw, which takes more disk and less decoding.
    """
    raw_share: float = 0.5
    """Share of the photos that mixed stores raw."""
    quality: int = 95
    """JPEG quality, where an image is encoded; JPEG files of the right size are stored as they are."""
    longest_side: int = 0
    """Shrink photos whose longer side has more pixels; 0: none."""
    workers: int = 2
    """Threads that decode and encode."""


@dataclass(frozen=True)
class Check:
    """Check .beton files, their checksums too, and describe them."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """The files."""


Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")] | Annotated[Check, tyro.conf.subcommand("check")]
)


def content_digest(source: ImageSource) -> str:
    """SHA-256 of all labels: shows which data set and order a file was written from."""
    return hashlib.sha256(np.ascontiguousarray(source.labels).tobytes()).hexdigest()


def prepare(options: Prepare) -> int:
    """Write both parts; returns the exit code."""
    for name, value, low, high in (
        ("quality", options.quality, 1, 100),
        ("raw-share", options.raw_share, 0, 1),
        ("longest-side", options.longest_side, 0, 65_535),
        ("workers", options.workers, 0, 1_024),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; expected {low} to {high}")
    parts = sources.load_original(options.dataset, options.data_root)
    mode = options.mode
    if mode == "auto":
        mode = "jpeg" if parts[0].is_photos else "raw"
    encoding = Encoding(mode, options.quality, options.raw_share, options.longest_side)
    for part, source, path in zip(
        sources.PARTS, parts, sources.beton_paths(options.dataset, options.out), strict=True
    ):
        description = {"dataset": options.dataset, "part": part, "labels_sha256": content_digest(source)}
        with tqdm(total=len(source), desc=path.name, unit="image", disable=None) as bar:
            write_beton(
                source, path, encoding=encoding, description=description, workers=options.workers,
                progress=bar.update,
            )  # fmt: skip
        print(f"{path}  {len(source):,} images, {path.stat().st_size / 1e6:,.0f} MB, {mode}")
    print(
        "\ntrain from them: "
        f"arat-fast train --dataset {options.dataset} --data-root {options.out} --loader ffcv"
    )
    return 0


def check(files: Sequence[Path]) -> int:
    """Print a line a file; returns the exit code. Raises UserError for the first that is damaged."""
    if not files:
        raise UserError("arat-fast data check: name at least one .beton file")
    for path in files:
        beton = inspect(path, checksum=True)
        size = "x".join(map(str, beton.one_size)) if beton.one_size else "several sizes"
        raw = float((beton.modes == RAW).mean())
        summed = "checksum matches" if checksum_path(path).exists() else "no checksum beside it"
        print(f"{path}  {len(beton.labels):,} images, {size}, {raw:.0%} raw, {summed}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = tyro.cli(Command, args=list(arguments), prog="arat-fast data")  # type: ignore[call-overload]
    return prepare(command) if isinstance(command, Prepare) else check(command.files)
