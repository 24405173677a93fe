"""What several tests need: small data in every layout, and the real data if it lies beside the checkout."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from image_files import SHARED

from arat_fast.config import TrainConfig, load_recipe
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.sources import load

# Inductor's cache does not know whether Triton interprets: a graph cached without it passes the wrong gate to
# the interpreted split-BN backward, whose gradient is then zero.
if os.environ.get("TRITON_INTERPRET") == "1":
    torch._inductor.config.force_disable_caches = True

# Two OpenMP threads that spin at each other's barriers on a busy machine run these small networks 30 times
# slower than one does; processes that tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: none begins while the other workers have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _dynamo_as_in_a_new_process() -> None:
    """Dynamo counts graphs, breaks and recompilations in the whole process: a test sees only its own."""
    if "torch._dynamo.utils" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _no_graph_freed_in_a_capture() -> Iterator[None]:
    """A collection that frees one CUDA graph while a test captures another breaks that capture off."""
    if torch.cuda.is_available():
        gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real CIFAR-10 in the official binary layout."""
    script = SHARED / "cifar10" / "unpack.py"
    if not script.exists():
        pytest.skip(f"the real CIFAR-10 is not at {script.parent}")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(script), str(root)], check=True, capture_output=True)
    return root


@pytest.fixture(scope="session")
def digits() -> tuple[ImageSet, ImageSet]:
    return load("digits")


@pytest.fixture
def tiny_config() -> TrainConfig:
    """Three epochs of 96 digits with a two-step attack: a second on two cores."""
    config = load_recipe("digits")
    return dataclasses.replace(
        config,
        epochs=3,
        batch_size=32,
        limit_train=96,
        device="cpu",
        attack=dataclasses.replace(config.attack, steps=2),
        evaluation=dataclasses.replace(config.evaluation, steps=2, limit=40),
    )
