"""JSON files that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from arat_fast.errors import TrainingError


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
