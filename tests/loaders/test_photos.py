"""Photos in class folders: crops as torchvision's, hashed; what is wrong with a folder is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import SHARED
from PIL import Image
from small_data import CPU, jpeg, needs_ffcv, photo_folder, smooth_photo

from arat_fast.errors import UserError
from arat_fast.loaders.beton_set import load_beton
from arat_fast.loaders.beton_write import Encoding, write_beton
from arat_fast.loaders.choose import open_stream
from arat_fast.loaders.crops import ResizedCrop, crop_and_resize
from arat_fast.loaders.photos import load_folder
from arat_fast.loaders.sources import load


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photo_folder(tmp_path / "photos")


def test_class_folders_are_read_as_torchvision_reads_them(root: Path) -> None:
    from arat_fast.loaders.torchvision_import import torchvision

    train, test = load("folder", str(root), 24)
    theirs = torchvision.datasets.ImageFolder(str(root / "train"))
    assert train.labels.tolist() == theirs.targets
    for index in range(len(train)):
        assert np.array_equal(train.image(index), np.asarray(theirs[index][0]))
    assert train.image_shape == test.image_shape == (24, 24, 3)
    assert (len(train), len(test), train.num_classes) == (12, 12, 3)


def test_crops_equal_torchvisions_and_are_hashed(root: Path) -> None:
    from arat_fast.loaders.torchvision_import import torchvision

    train, _ = load_folder(str(root), 24)
    streams = [open_stream("torchvision", train, batch_size=5, seed=3, device=CPU, workers=w) for w in (0, 2)]
    first, second = (list(stream.epoch(2)) for stream in streams)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)  # whatever the number of workers
    heights = np.array([train.open(i).height for i in range(12)])
    widths = np.array([train.open(i).width for i in range(12)])
    boxes = ResizedCrop(24).boxes(np.arange(12), heights, widths, seed=3, epoch=2)
    for batch in first:
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            right = torchvision.transforms.functional.resized_crop(
                train.open(index), *boxes[index].tolist(), [24, 24]
            )
            assert np.array_equal(image.numpy(), np.asarray(right))
    assert not np.array_equal(boxes, ResizedCrop(24).boxes(np.arange(12), heights, widths, seed=3, epoch=3))


def test_evaluation_sees_torchvisions_resize_and_centre_crop(root: Path) -> None:
    from arat_fast.loaders.torchvision_import import torchvision

    _, test = load("folder", str(root), 32)
    photos = load_folder(str(root), 32)[1]
    transforms = torchvision.transforms
    usual = transforms.Compose([transforms.Resize(round(32 * 256 / 224)), transforms.CenterCrop(32)])
    for index in range(len(test)):
        assert np.array_equal(test.image(index), np.asarray(usual(photos.open(index))))


@needs_ffcv
@pytest.mark.parametrize("mode", ["jpeg", "raw", "mixed"])
def test_ffcv_crops_the_same_boxes(mode: str, root: Path, tmp_path: Path) -> None:
    train, _ = load_folder(str(root), 24)
    write_beton(train, tmp_path / "p.beton", encoding=Encoding(mode))  # type: ignore[arg-type]
    source = load_beton(tmp_path / "p.beton", side=24)
    epochs = [
        list(open_stream(name, source, batch_size=5, seed=3, device=CPU, workers=workers).epoch(2))
        for name, workers in (("torchvision", 0), ("ffcv", 1), ("ffcv", 3))
    ]  # type: ignore[arg-type]
    for plain, one, three in zip(*epochs, strict=True):
        assert torch.equal(one.images, three.images)
        assert torch.equal(plain.indices, one.indices)
        assert torch.equal(plain.labels, one.labels)
        # Another resizing filter (area, for bilinear with antialiasing) and JPEG decoder: close, not equal.
        difference = (plain.images.int() - one.images.int()).abs().float()
        assert difference.mean() < 4
    assert not torch.equal(epochs[1][0].images, epochs[1][1].images)


def test_sizes_that_are_no_photos_have_boxes_inside(root: Path) -> None:
    boxes = ResizedCrop(8).boxes(np.arange(500), np.full(500, 3), np.full(500, 1_000), seed=0, epoch=1)
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 3).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 1_000).all()
    assert crop_and_resize(smooth_photo(3, 1_000, 0), tuple(boxes[0].tolist()), 8).shape == (8, 8, 3)


def test_a_corrupt_jpeg_is_named_by_every_worker_count(root: Path) -> None:
    train, _ = load_folder(str(root), 24)
    bad = train.paths[4]
    bad.write_bytes(bad.read_bytes()[:400])
    for workers in (0, 2):
        stream = open_stream("torchvision", train, batch_size=4, seed=0, device=CPU, workers=workers)
        with pytest.raises(UserError, match=rf"^cannot read the image {bad}: .*Restore or remove it$"):
            list(stream.epoch(1))
    bad.write_text("not a photo")
    with pytest.raises(UserError, match="not an image, or damaged"):
        train.image(4)
    bad.unlink()
    with pytest.raises(UserError, match="No such file"):
        train.image(4)


def test_folders_with_something_missing_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --data-root"):
        load("folder")
    with pytest.raises(UserError, match="holds no train/"):
        load("folder", str(tmp_path))
    (root / "train" / "class9").mkdir()
    with pytest.raises(UserError, match=r"train/class9 holds no photos .*fill the class folder"):
        load("folder", str(root))
    (root / "train" / "class9" / "notes.txt").write_text("no photo")
    with pytest.raises(UserError, match="class9 holds no photos"):
        load("folder", str(root))
    for file in (root / "train" / "class9" / "notes.txt",):
        file.unlink()
    (root / "train" / "class9").rmdir()
    (root / "val" / "class7").mkdir()
    with pytest.raises(UserError, match="class folder 'class7' that the training photos lack"):
        load("folder", str(root))
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match="holds no val/"):
        load("folder", str(root))
    (root / "val").mkdir()
    (root / "train").rename(root / "old")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        load("folder", str(root))


def test_imagenette_by_its_usual_folders(root: Path) -> None:
    root.rename(root.parent / "imagenette2-160")
    train, test = load("imagenette", str(root.parent))
    assert train.image_shape == (160, 160, 3)
    assert test.images.shape == (12, 160, 160, 3)
    again, _ = load("imagenette", str(root.parent / "imagenette2-160"), 64)
    assert again.image_shape == (64, 64, 3)


@needs_ffcv
def test_real_photos_through_ffcv(tmp_path: Path) -> None:
    where = SHARED / "photos_sign_digits"
    if not where.is_dir():
        pytest.skip(f"the real photos are not at {where}")
    train, test = load_folder(str(where), 64)
    assert (len(train), len(test), train.num_classes) == (200, 100, 10)
    write_beton(train, tmp_path / "t.beton", encoding=jpeg())
    read = load_beton(tmp_path / "t.beton", side=64)
    assert all(np.array_equal(read.image(i), train.image(i)) for i in range(0, 200, 17))
    stream = open_stream("ffcv", read, batch_size=32, seed=0, device=CPU, workers=2)
    batches = list(stream.epoch(1))
    indices = torch.cat([b.indices for b in batches])
    assert sorted(indices.tolist()) == list(range(200))
    assert np.array_equal(torch.cat([b.labels for b in batches]).numpy(), train.labels[indices.numpy()])
    plain = open_stream("torchvision", train, batch_size=32, seed=0, device=CPU)
    for a, b in zip(batches, plain.epoch(1), strict=True):
        assert (a.images.int() - b.images.int()).abs().float().mean() < 6


def test_grey_palette_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    """Grey, palette and RGBA files become RGB, as ImageFolder's loader makes them."""
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            photo = smooth_photo(20, 20, 1)
            photo.convert("L").save(tmp_path / part / label / "1.png")
            photo.convert("P").save(tmp_path / part / label / "2.png")
            Image.merge("RGBA", (*photo.split(), photo.convert("L"))).save(tmp_path / part / label / "3.png")
    train, _ = load("folder", str(tmp_path), 16)
    assert [train.image(i).shape for i in range(6)] == [(20, 20, 3)] * 6
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
