"""SVHN and Tiny-ImageNet as they lie on disk when downloaded."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_data import smooth_photo

from arat_fast.errors import UserError
from arat_fast.loaders.sources import load

scipy_io = pytest.importorskip("scipy.io")


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Both .mat files with 12 images each; torchvision's checksums are replaced by these files'."""
    from arat_fast.loaders.torchvision_import import torchvision

    rng = np.random.default_rng(0)
    sums, images = {}, {}
    for split in ("train", "test"):
        images[split] = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(1, 13)[:, None] % 10
        labels[labels == 0] = 10  # as published: the digit 0 has the label 10
        file = root / f"{split}_32x32.mat"
        scipy_io.savemat(file, {"X": images[split].transpose(1, 2, 3, 0), "y": labels.astype(np.uint8)})
        sums[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    return images


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_svhn(tmp_path, monkeypatch)
    train, test = load("svhn", str(tmp_path))
    assert np.array_equal(train.in_memory().images, images["train"])
    assert np.array_equal(test.images, images["test"])
    assert train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert train.num_classes == 10
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test_32x32\.mat is damaged \(checksum\)"):
        load("svhn", str(tmp_path))
    (tmp_path / "train_32x32.mat").unlink()
    with pytest.raises(UserError, match=r"train_32x32\.mat is missing: .* put the cropped digits'"):
        load("svhn", str(tmp_path))


def write_tiny_imagenet(root: Path) -> Path:
    """Two classes of three training images, and an annotated val/ of two."""
    base = root / "tiny-imagenet-200"
    names = ["n01443537", "n01629819"]
    for label, name in enumerate(names):
        folder = base / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{name}_boxes.txt").write_text("")
        for k in range(3):
            smooth_photo(64, 64, 10 * label + k).save(folder / f"{name}_{k}.JPEG")
    (base / "val" / "images").mkdir(parents=True)
    lines = []
    for k, name in enumerate(reversed(names)):
        smooth_photo(64, 64, 100 + k).save(base / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t1\t1\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(names))
    return base


def test_tiny_imagenet(tmp_path: Path) -> None:
    base = write_tiny_imagenet(tmp_path)
    train, test = load("tiny-imagenet", str(tmp_path))
    assert train.image_shape == (64, 64, 3)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [1, 0]
    again, _ = load("tiny-imagenet", str(base))
    assert np.array_equal(again.in_memory().images, train.in_memory().images)
    # Sorted into class folders, as many scripts leave it.
    for k, name in enumerate(("n01629819", "n01443537")):
        (base / "val" / name).mkdir()
        shutil.move(base / "val" / "images" / f"val_{k}.JPEG", base / "val" / name / "0.JPEG")
    (base / "val" / "val_annotations.txt").unlink()
    (base / "val" / "images").rmdir()
    _, sorted_test = load("tiny-imagenet", str(tmp_path))
    assert sorted_test.labels.tolist() == [0, 1]
    assert np.array_equal(sorted_test.images[::-1], test.images)


def test_tiny_imagenet_with_something_wrong_is_named(tmp_path: Path) -> None:
    base = write_tiny_imagenet(tmp_path)
    with pytest.raises(UserError, match="needs --data-root"):
        load("tiny-imagenet")
    photo = base / "train" / "n01443537" / "images" / "n01443537_1.JPEG"
    smooth_photo(50, 64, 0).save(photo)
    with pytest.raises(UserError, match=rf"{photo} is 64 x 50; expected 64 x 64"):
        load("tiny-imagenet", str(tmp_path))
    photo.unlink()
    annotations = base / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + "val_9.JPEG\tn99999999\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt, line 3: no class of train/ in 'val_9"):
        load("tiny-imagenet", str(tmp_path))
    shutil.rmtree(base / "val")
    with pytest.raises(UserError, match="holds no tiny-imagenet-200/val"):
        load("tiny-imagenet", str(tmp_path))
