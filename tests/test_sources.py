"""Data sets: layouts, exact pixels, and what is wrong with a folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_files import write_cifar10_binary

from arat_fast.errors import UserError
from arat_fast.loaders import cifar
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.sources import SHAPES, load


def test_digits_are_disjoint_balanced_and_span_the_grey_levels(digits: tuple[ImageSet, ImageSet]) -> None:
    train, test = digits
    assert (len(train), len(test)) == (1442, 355)
    assert (train.image_shape, train.num_classes, len(train)) == SHAPES["digits"]
    assert train.images.max() == 255
    assert train.images.min() == 0
    assert set(np.bincount(test.labels)) <= {34, 35, 36}
    from sklearn.datasets import load_digits

    grey = load_digits().images
    assert sorted(np.rint(grey * 255 / 16).astype(np.uint8).reshape(-1, 64).tolist()) == sorted(
        [*train.images.reshape(-1, 64).tolist(), *test.images.reshape(-1, 64).tolist()]
    )


def test_real_cifar10_in_the_binary_layout(cifar_root: Path) -> None:
    train, test = load("cifar10", str(cifar_root))
    assert train.images.shape == (50_000, 32, 32, 3)
    assert test.images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(train.labels) == 5_000).all()
    assert (np.bincount(test.labels) == 1_000).all()
    # Known of the data set: the channels' means of the training images, in [0, 1].
    means = train.images.mean((0, 1, 2)) / 255
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    # The folder itself is accepted too.
    again, _ = load("cifar10", str(cifar_root / "cifar-10-batches-bin"))
    assert np.array_equal(again.labels, train.labels)


def write_python_layout(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """torchvision's layout with 10 images a file; torchvision's checksums are replaced by these files'."""
    import hashlib

    from arat_fast.loaders.torchvision_import import torchvision

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    first = None
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        first = data if first is None else first
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        lists["test_list" if name == "test_batch" else "train_list"].append([name, digest])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    dataset = torchvision.datasets.CIFAR10
    for name, value in lists.items():
        monkeypatch.setattr(dataset, name, value)
    monkeypatch.setattr(dataset, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    assert first is not None
    return first


def test_torchvisions_python_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_python_layout(tmp_path, monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train, test = load("cifar10", str(root))
        assert train.images.shape == (50, 32, 32, 3)
        assert len(test) == 10
        assert np.array_equal(train.images[:10], first.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
        assert train.labels.tolist() == list(range(10)) * 5


def test_cifar100_binary_takes_the_fine_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    monkeypatch.setattr(cifar, "TEST_RECORDS", 4)
    layout = cifar.LAYOUTS["cifar100"]
    monkeypatch.setitem(cifar.LAYOUTS, "cifar100", type(layout)(**{**vars(layout), "train_records": 6}))
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 4)):
        records = rng.integers(0, 256, (count, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = 7, np.arange(count) + 90
        records.tofile(folder / f"{name}.bin")
    train, test = load("cifar100", str(tmp_path))
    assert train.labels.tolist() == [90, 91, 92, 93, 94, 95]
    assert test.num_classes == 100


@pytest.fixture(scope="module")
def binary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10_binary(tmp_path_factory.mktemp("binary"))


def copy_of(root: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for file in (root / folder.name).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("cut", [1, 3073, 15_000_000])
def test_truncated_files_are_named(binary_root: Path, tmp_path: Path, cut: int) -> None:
    folder = copy_of(binary_root, tmp_path)
    replace(folder, "data_batch_3.bin", (folder / "data_batch_3.bin").read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"data_batch_3.bin has .* expected 10,000 records .* unpack"):
        load("cifar10", str(tmp_path))


def test_labels_out_of_range_are_named(binary_root: Path, tmp_path: Path) -> None:
    folder = copy_of(binary_root, tmp_path)
    damaged = bytearray((folder / "test_batch.bin").read_bytes())
    damaged[3073 * 5] = 77
    replace(folder, "test_batch.bin", bytes(damaged))
    with pytest.raises(UserError, match=r"test_batch.bin holds the label 77; expected 0 to 9"):
        load("cifar10", str(tmp_path))


def test_a_missing_file_is_named(binary_root: Path, tmp_path: Path) -> None:
    folder = copy_of(binary_root, tmp_path)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"cannot read .*data_batch_2.bin: No such file"):
        load("cifar10", str(tmp_path))


def test_damaged_python_layout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_python_layout(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cifar-10-batches-py: .* missing or damaged"):
        load("cifar10", str(tmp_path))


def test_wrong_folders_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; give the one that holds cifar-10-batches-bin"):
        load("cifar10", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no cifar10: expected cifar-10-batches-py/"):
        load("cifar10", str(tmp_path))


def test_unknown_data_set_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown data set 'cifar-10': did you mean 'cifar10'"):
        load("cifar-10")


def test_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arat_fast.loaders.torchvision_import import torchvision

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="network is unreachable; no network"):
        load("cifar10")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.full((2, 4, 4, 3), np.nan, np.float32), [0, 1], "float32"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 2], "2 images but 3 labels"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "from -1 to 0"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "no images"),
    ],
)
def test_images_in_memory_are_checked(images: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageSet(images, np.array(labels, dtype=np.int64), 10, "mine")


def test_validation_split_is_fixed_by_the_seed(digits: tuple[ImageSet, ImageSet]) -> None:
    train, _ = digits
    rest, held = train.split(100, seed=3)
    again = train.split(100, seed=3)[1]
    other = train.split(100, seed=4)[1]
    assert (len(rest), len(held)) == (len(train) - 100, 100)
    assert np.array_equal(held.images, again.images)
    assert not np.array_equal(held.images, other.images)
    both = [*rest.images.reshape(-1, 64).tolist(), *held.images.reshape(-1, 64).tolist()]
    assert sorted(both) == sorted(train.images.reshape(-1, 64).tolist())
    with pytest.raises(UserError, match="cannot hold out 1442 of 1442"):
        train.split(1442, seed=0)
