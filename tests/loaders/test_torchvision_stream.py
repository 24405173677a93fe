"""The DataLoader stream's own hazards, and the familiar pipeline that others are compared with."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import CPU, photo_folder, random_images, run_script

from arat_fast.errors import UserError
from arat_fast.loaders.choose import open_stream
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.photos import load_folder
from arat_fast.loaders.torchvision import familiar_pipeline


@dataclass(frozen=True)
class Deadly(ImageSet):
    """Ends the process that reads it, as the kernel does when memory runs out."""

    def images_at(self, indices: object) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_is_told_of() -> None:
    images = random_images()
    source = Deadly(images.images, images.labels, images.num_classes, images.source)
    stream = open_stream("torchvision", source, batch_size=8, seed=0, device=CPU, workers=1)
    with pytest.raises(UserError, match=r"a loader process died .* Use fewer --workers, or 0"):
        list(stream.epoch(1))


def test_leaving_early_and_exiting_does_not_hang() -> None:
    result = run_script(
        """
        import multiprocessing
        from small_data import CPU, random_images
        from arat_fast.loaders.choose import open_stream
        stream = open_stream("torchvision", random_images(), batch_size=8, seed=0, device=CPU, workers=2)
        for batch in stream.epoch(1):
            break
        assert not multiprocessing.active_children()
        begun = stream.epoch(2)
        next(begun)
        print("done")
        """
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    list(open_stream("torchvision", random_images(), batch_size=8, seed=0, device=CPU, workers=1).epoch(1))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("photos", [False, True])
def test_the_familiar_pipeline_yields_augmented_floats(photos: bool, tmp_path: Path) -> None:
    source = load_folder(str(photo_folder(tmp_path)), 16)[0] if photos else random_images(count=12)
    batches = list(familiar_pipeline(source, batch_size=8, workers=0))
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert images.shape == (12, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert sorted(labels.tolist()) == sorted(source.labels.tolist())
