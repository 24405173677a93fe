"""Records of measurements: what their numbers rest on, and JSON files written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

from arat_fast.errors import TrainingError, UserError

# A run's own: nothing else may be written there.
_OF_A_RUN = ("config.json", "environment.json", "results.json", "metrics.jsonl")


def check_writable(path: Path | None) -> None:
    """Make the folder of a file that is to be written; to be asked before the work whose result goes there.

    Raises UserError where nothing can be written, or where a run's own file or one that is not JSON would be
    lost. None is nowhere, and fine.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {path}: {error.strerror}; give another place") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; give another place")
    if path.name in _OF_A_RUN and (path.parent / "config.json").is_file():
        raise UserError(f"{path} is one of the run's own files; choose another name")
    if path.is_file() and (path.suffix in (".pt", ".jsonl") or not _is_json(path)):
        raise UserError(f"{path} exists and is no JSON record, it would be lost; choose another name")


def _is_json(path: Path) -> bool:
    """Whether a file holds JSON, or nothing yet."""
    try:
        if text := path.read_text():
            json.loads(text)
    except (OSError, ValueError):
        return False
    return True


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all. Raises TrainingError when the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror}; make room or give another place"
        ) from error


def binomial_error(accuracy: float, count: int) -> float:
    """How far the 95 % interval of an accuracy in [0, 1] measured on `count` images reaches from it.

    Wilson's score interval, to its farther end: the half-width of the normal approximation is 0 where every
    image, or none, is classified correctly, as if ten such images were proof.
    """
    z2 = 1.96**2 / count
    centre = (accuracy + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * accuracy * (1 - accuracy) + z2 * z2 / 4) / (1 + z2)
    return abs(centre - accuracy) + half


def sha256_of(path: Path) -> str:
    """A file's digest in hexadecimal: what a record says about the checkpoint that it measured."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
