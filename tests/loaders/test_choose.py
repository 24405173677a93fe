"""`--loader auto` and what each named loader refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from small_data import CPU, needs_ffcv, photo_folder, random_images, raw_beton

from arat_fast.errors import UserError
from arat_fast.loaders import choose
from arat_fast.loaders.choose import LoaderName, open_stream
from arat_fast.loaders.images import ImageSource
from arat_fast.loaders.photos import load_folder


def opened(name: LoaderName, source: ImageSource) -> str:
    return type(open_stream(name, source, batch_size=4, seed=0, device=CPU)).__name__


def test_auto_is_resident_where_the_images_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert opened("auto", random_images()) == "ResidentStream"
    assert "loader: resident: the data set takes 0 MB" in caplog.text
    assert "25% is resident" in caplog.text


def test_auto_without_room_and_without_a_file_is_torchvision(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = random_images()
    monkeypatch.setattr(choose, "device_memory", lambda device: 4 * images.images.nbytes)
    assert choose.choose(images, CPU)[0] == "resident"
    monkeypatch.setattr(choose, "device_memory", lambda device: 4 * images.images.nbytes - 4)
    with caplog.at_level(logging.INFO):
        assert opened("auto", images) == "TorchvisionStream"
    assert "more than 25%, and there is no .beton of it" in caplog.text


@needs_ffcv
def test_auto_without_room_is_ffcv_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beton = raw_beton(tmp_path, random_images())
    assert opened("auto", beton) == "ResidentStream"
    monkeypatch.setattr(choose, "device_memory", lambda device: 1_000)
    with caplog.at_level(logging.INFO):
        assert opened("auto", beton) == "FFCVStream"
    assert "neighbours on disk are read together" in caplog.text
    monkeypatch.setattr(choose, "why_not", lambda: "FFCV is not installed")
    assert choose.choose(beton, CPU) == (
        "torchvision",
        f"the data set takes 0 MB, {203 * 768 / 1000:.1%} of the memory of cpu, more than 25%, and FFCV "
        "is not installed",
    )


def test_photos_are_never_resident(tmp_path: Path) -> None:
    photos, _ = load_folder(str(photo_folder(tmp_path)), 16)
    name, reason = choose.choose(photos, CPU)
    assert name == "torchvision"
    assert "photos are cropped anew each epoch, and there is no .beton" in reason
    with pytest.raises(UserError, match=r"--loader resident: .* holds photos"):
        opened("resident", photos)


def test_ffcv_wants_a_prepared_file() -> None:
    with pytest.raises(
        UserError, match=r"--loader ffcv reads \.beton files, and random is none: write one with"
    ):
        opened("ffcv", random_images())
