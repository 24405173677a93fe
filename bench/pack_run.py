"""The trained network of a run in half precision, in parts of under 16 MiB: python bench/pack_run.py RUN OUT.

    python bench/pack_run.py --join OUT WEIGHTS.pt

puts the parts together again, to a state_dict in half precision for `network.load_state_dict`. The manifest
holds each part's SHA-256, and the largest relative change that rounding made to a tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path

import torch

from arat_fast.evaluation.network import load_run

PART = 15 << 20


def pack(run: Path, out: Path) -> Path:
    """Write weights.pt.NN and manifest.json; returns the manifest's path."""
    trained = load_run(run, torch.device("cpu"))
    state = trained.network.state_dict()
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    for name, value in half.items():
        if not torch.isfinite(value.float()).all():
            raise SystemExit(f"{name} does not fit half precision")
    change = max(
        float((half[name].float() - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in state.items()
        if value.is_floating_point()
    )
    buffer = io.BytesIO()
    torch.save(half, buffer)
    data = buffer.getvalue()
    parts = []
    for number, start in enumerate(range(0, len(data), PART)):
        part = out / f"weights.pt.{number:02}"
        part.write_bytes(data[start : start + PART])
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        parts.append({"file": part.name, "bytes": part.stat().st_size, "sha256": digest})
    manifest = {
        "weights": trained.weights,
        "epochs": trained.epochs,
        "largest_change": change,
        "parts": parts,
    }
    path = out / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def join(out: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write and return the state_dict of the parts. Raises SystemExit for a damaged one."""
    data = b""
    for part in json.loads((out / "manifest.json").read_text())["parts"]:
        piece = (out / part["file"]).read_bytes()
        if hashlib.sha256(piece).hexdigest() != part["sha256"]:
            raise SystemExit(f"{out / part['file']} is damaged")
        data += piece
    target.write_bytes(data)
    state: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--join", action="store_true", help="put parts together again")
    parser.add_argument("first", type=Path, help="run directory; with --join the folder of the parts")
    parser.add_argument("second", type=Path, help="folder of the parts; with --join the file to write")
    options = parser.parse_args()
    if options.join:
        print(f"{len(join(options.first, options.second))} tensors in {options.second}")
    else:
        print(pack(options.first, options.second))


if __name__ == "__main__":
    main()
