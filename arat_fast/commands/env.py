"""`arat-fast env`: versions, device and revision, as a run records them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from arat_fast.environment import environment
from arat_fast.kernels.cpp_library import has_cpp_kernels
from arat_fast.training.build import pick_device


@dataclass(frozen=True)
class EnvOptions:
    """Show versions, processor and GPU: what to paste into a bug report."""


def main(arguments: Sequence[str]) -> int:
    """Print the environment as JSON."""
    tyro.cli(EnvOptions, args=list(arguments), prog="arat-fast env", config=(tyro.conf.AvoidSubcommands,))
    found = environment(pick_device("auto")) | {"cpp_kernels": has_cpp_kernels()}
    print(json.dumps(found, indent=2))
    return 0
