"""`analysis_every`: what is collected on the way, and that training goes on to the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from arat_fast.analysis.collect import collected
from arat_fast.config import TrainConfig
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer


def test_collection_changes_nothing_and_survives_a_resume(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    plain = Trainer(tiny_config, digits[0], tmp_path / "plain")
    plain.run()
    config = dataclasses.replace(tiny_config, analysis_every=2)
    part = Trainer(dataclasses.replace(config, epochs=2), digits[0], tmp_path / "run")
    part.run()
    whole = Trainer(config, digits[0], tmp_path / "run", resume=True)
    whole.run()
    for a, b in zip(plain.engine.parameters(), whole.engine.parameters(), strict=True):
        assert torch.equal(a, b)
    found = collected(tmp_path / "run")
    # Three batches an epoch, so steps 3 to 11; the even ones, each once.
    assert [line["step"] for line in found.conflict] == [4, 6, 8, 10]
    for line in found.conflict:
        assert -1 <= line["overall"]["cosine"] <= 1
        assert 0 <= line["overall"]["share"] <= 1
    assert [line["epoch"] for line in found.snapshots] == [1, 2, 3]
    assert found.snapshots[0]["branches"].keys() == {"clean", "adv"}
