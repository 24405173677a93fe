"""Image files for tests: where the real ones may lie, and made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the checkout, where it is there at all


def write_cifar10_binary(root: Path, train: int = 10_000, seed: int = 0) -> Path:
    """Random images in the official binary layout: six files, `train` records in each of the five."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = rng.integers(0, 256, (10_000 if name == "test_batch" else train, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return root
