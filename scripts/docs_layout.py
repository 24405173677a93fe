"""MkDocs hook: the package as an installation lays it out, for pages that are written from docstrings.

In a checkout kernels/ and loaders/ lie at the top; what reads sources finds them as arat_fast.kernels and
arat_fast.loaders only in a folder of links.
"""

from __future__ import annotations

import shutil
from pathlib import Path


def on_startup(command: str, dirty: bool) -> None:
    """Make .cache/docs/arat_fast anew, before anyone looks for it."""
    root = Path(__file__).resolve().parent.parent
    package = root / ".cache" / "docs" / "arat_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    parts = [p for p in (root / "arat_fast").iterdir() if p.is_dir() or p.suffix == ".py"]
    for part in [*parts, root / "kernels", root / "loaders"]:
        (package / part.name).symlink_to(part)
