"""`.beton` files: what is written is what FFCV reads, and nothing damaged is trusted."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import CPU, jpeg, needs_ffcv, photo_folder, random_images, raw_beton, run_script, smooth_photo

from arat_fast.errors import UserError
from arat_fast.loaders import beton, beton_write
from arat_fast.loaders.beton import ALLOCATION, FIELD, HEADER, RECORD, checksum_path, inspect
from arat_fast.loaders.beton_set import load_beton
from arat_fast.loaders.beton_write import Encoding, write_beton
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.photos import load_folder


def test_raw_images_come_back_exactly(tmp_path: Path) -> None:
    data = random_images()
    read = raw_beton(tmp_path, data)
    assert np.array_equal(read.in_memory().images, data.images)
    assert np.array_equal(read.labels, data.labels)
    assert np.array_equal(read.image(7), data.images[7])
    assert (read.num_classes, read.image_shape, len(read)) == (7, (16, 16, 3), 203)
    assert sorted(os.listdir(tmp_path)) == ["images.beton", "images.beton.sha256"]
    line = checksum_path(tmp_path / "images.beton").read_text()
    assert (
        line == f"{beton.file_digest(tmp_path / 'images.beton')}  images.beton\n"
    )  # as sha256sum -c reads it


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    photos, _ = load_folder(str(photo_folder(tmp_path / "photos")), 32)
    for workers in (1, 3):
        write_beton(photos, tmp_path / f"{workers}.beton", encoding=Encoding("mixed"), workers=workers)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()
    modes = inspect(tmp_path / "1.beton").modes
    assert 0 < modes.sum() < len(modes)


@needs_ffcv
def test_equal_to_what_ffcvs_own_writer_writes(tmp_path: Path) -> None:
    data = random_images(count=30)
    write_beton(data, tmp_path / "ours.beton")
    np.savez(tmp_path / "data.npz", images=data.images, labels=data.labels)
    result = run_script(
        """
        import sys, numpy as np
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        folder = sys.argv[2]
        data = np.load(folder + "/data.npz")
        rows = [(i, int(l)) for i, l in zip(data["images"], data["labels"])]
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        DatasetWriter(folder + "/theirs.beton", fields, num_workers=1).from_indexed_dataset(rows)
        """,
        str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = ((tmp_path / f"{name}.beton").read_bytes() for name in ("ours", "theirs"))
    room = HEADER.itemsize + 2 * FIELD.itemsize - 1024  # the label's arguments: our description, their zeros
    assert ours[:room] == theirs[:room]
    assert ours[room + 1024 :] == theirs[room + 1024 :]
    assert np.array_equal(load_beton(tmp_path / "theirs.beton").in_memory().images, data.images)


def test_jpeg_files_are_stored_as_they_are(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos")
    Image.fromarray(np.full((20, 30), 99, np.uint8)).save(root / "train/class0/grey.jpg")
    smooth_photo(24, 20, 5).save(root / "train/class1/photo.png")
    photos, _ = load_folder(str(root), 32)
    path = tmp_path / "photos.beton"
    write_beton(photos, path, encoding=jpeg())
    read = load_beton(path, side=32)
    data = path.read_bytes()
    for index, file in enumerate(photos.paths):
        place, size = int(read.file.places[index]), int(read.file.sizes[index])
        same = data[place : place + size] == file.read_bytes()
        assert same == (file.name not in ("grey.jpg", "photo.png"))  # those are encoded anew, RGB
        assert read.image(index).shape == photos.image(index).shape
        assert np.abs(read.image(index).astype(int) - photos.image(index)).max() <= (0 if same else 40)
    assert read.is_photos
    assert np.array_equal(read.labels, photos.labels)


def test_photos_are_shrunk_to_the_longest_side(tmp_path: Path) -> None:
    photos, _ = load_folder(str(photo_folder(tmp_path / "photos")), 32)
    write_beton(photos, tmp_path / "p.beton", encoding=Encoding("raw", longest_side=30))
    file = inspect(tmp_path / "p.beton")
    assert np.maximum(file.heights, file.widths).max() == 30
    ratio = file.widths / file.heights
    assert ratio == pytest.approx([p.size[0] / p.size[1] for p in map(photos.open, range(12))], abs=0.04)


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    result = change(data)
    path.write_bytes(result if isinstance(result, bytes | bytearray) else data)


def table_of(data: bytearray) -> int:
    return int(np.frombuffer(data, HEADER, 1)["table"][0])


def set_table(data: bytearray, name: str, value: int, row: int = 3) -> None:
    at = table_of(data) + row * ALLOCATION.itemsize
    entry = np.frombuffer(data, ALLOCATION, 1, at).copy()
    entry[name] = value
    data[at : at + ALLOCATION.itemsize] = entry.tobytes()


def set_record(data: bytearray, name: str, value: int, row: int = 3) -> None:
    at = HEADER.itemsize + 2 * FIELD.itemsize + row * RECORD.itemsize
    entry = np.frombuffer(data, RECORD, 1, at).copy()
    entry["f1" if name == "label" else "f0"][... if name == "label" else name] = value
    data[at : at + RECORD.itemsize] = entry.tobytes()


def set_header(data: bytearray, name: str, value: int) -> None:
    header = np.frombuffer(data, HEADER, 1).copy()
    header[name] = value
    data[: HEADER.itemsize] = header.tobytes()


DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "empty": (lambda d: b"", "is empty"),
    "cut in the header": (lambda d: d[:10], "no .beton file, or cut short"),
    "cut in the field table": (lambda d: d[:500], "cut short in its field table"),
    "cut by one byte": (lambda d: d[:-1], "cut short or damaged"),
    "cut by one record": (lambda d: d[: -ALLOCATION.itemsize], "cut short or damaged"),
    "cut by half": (lambda d: d[: len(d) // 2], "cut short or damaged"),
    "longer": (lambda d: d + b"x", "cut short or damaged"),
    "foreign": (lambda d: b"\x89PNG" + bytes(5_000), r"no \.beton file of version 2"),
    "another version": (lambda d: set_header(d, "version", 3), r"no \.beton file of version 2"),
    "unfinished": (lambda d: set_header(d, "table", 0), "was not finished"),
    "no images": (lambda d: set_header(d, "samples", 0), "holds no images"),
    "more images than there are": (lambda d: set_header(d, "samples", 2**40), "cut short or damaged"),
    "another field": (
        lambda d: d.__setitem__(HEADER.itemsize + FIELD.itemsize, 0),
        r"label \(float\); expected",
    ),
    "wrong place in the table": (lambda d: set_table(d, "place", 2**63), "do not agree"),
    "overlapping images": (lambda d: set_table(d, "size", 769), "do not agree"),
    "an image twice in the table": (lambda d: set_table(d, "sample", 4), "do not agree"),
    "an image beyond the table": (lambda d: set_table(d, "sample", 9_999), "do not agree"),
    "wrong place in a record": (lambda d: set_record(d, "place", 8 << 20), "do not agree"),
    "wrong width": (lambda d: set_record(d, "width", 17), "do not agree"),
    "no height": (lambda d: set_record(d, "height", 0), "do not agree"),
    "unknown mode": (lambda d: set_record(d, "mode", 7), "do not agree"),
    "negative label": (lambda d: set_record(d, "label", -1), "holds labels from -1"),
    "label beyond the classes": (lambda d: set_record(d, "label", 7), "to 7; expected 0 to 6"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named_before_anything_reads_them(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    raw_beton(tmp_path, random_images(count=40))
    path = tmp_path / "images.beton"
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    assert any(remedy in str(caught.value) for remedy in ("data prepare", "give one", "convert it"))


def test_missing_files_and_changed_pixels_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.beton: No such file .*data prepare"):
        inspect(tmp_path / "none.beton")
    raw_beton(tmp_path, random_images(count=40))
    path = tmp_path / "images.beton"
    edit(path, lambda d: d.__setitem__((8 << 20) + 5, d[(8 << 20) + 5] ^ 1))
    with pytest.raises(UserError, match=r"does not match its checksum images\.beton\.sha256"):
        inspect(path)
    checksum_path(path).write_text("")
    with pytest.raises(UserError, match="does not match its checksum"):
        inspect(path)
    checksum_path(path).unlink()
    inspect(path)
    assert "no checksum beside it" in caplog.text


def test_files_of_another_data_set_are_named(tmp_path: Path) -> None:
    raw_beton(tmp_path, random_images())
    path = tmp_path / "images.beton"
    with pytest.raises(UserError, match="holds images of 16 x 16; expected 32 x 32"):
        load_beton(path, shape=(32, 32, 3))
    with pytest.raises(UserError, match="has 7 classes; expected 5"):
        load_beton(path, num_classes=5)
    photos, _ = load_folder(str(photo_folder(tmp_path / "photos")), 32)
    write_beton(photos, tmp_path / "p.beton", encoding=jpeg())
    with pytest.raises(UserError, match="several sizes: say to which side"):
        load_beton(tmp_path / "p.beton")
    with pytest.raises(UserError, match="several sizes; expected 32 x 32"):
        load_beton(tmp_path / "p.beton", shape=(32, 32, 3), side=32)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_beton(tmp_path, random_images(count=40))
    before = (tmp_path / "images.beton").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(beton_write.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*images\.beton: No space left .* free some space"):
        write_beton(random_images(count=41), tmp_path / "images.beton")
    assert sorted(os.listdir(tmp_path)) == ["images.beton", "images.beton.sha256"]
    assert (tmp_path / "images.beton").read_bytes() == before
    inspect(tmp_path / "images.beton")


def test_a_file_size_limit_is_met_like_a_full_disk(tmp_path: Path) -> None:
    result = run_script(
        """
        import resource, signal, sys
        from pathlib import Path
        from small_data import random_images
        from arat_fast.errors import UserError
        from arat_fast.loaders.beton_write import write_beton
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_beton(random_images(count=4_000), Path(sys.argv[2]) / "a.beton")
        except UserError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert "File too large; free some space or choose another --out" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(random_images(), tmp_path / "a.beton", progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    grey = ImageSet(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), 2, "digits")
    with pytest.raises(UserError, match="digits has 1 channel"):
        write_beton(grey, tmp_path / "a.beton")
    large = ImageSet(np.zeros((1, 2_000, 2_000, 3), np.uint8), np.array([0]), 1, "large")
    with pytest.raises(UserError, match=r"image 0 of large takes 12,000,000 bytes.*--longest-side"):
        write_beton(large, tmp_path / "a.beton")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        write_beton(random_images(), tmp_path / "file" / "a.beton")
    photos, _ = load_folder(str(photo_folder(tmp_path / "photos")), 32)
    photos.paths[2].write_bytes(photos.paths[2].read_bytes()[:300])
    with pytest.raises(UserError, match=rf"cannot read the image {photos.paths[2]}: .*Restore or remove"):
        write_beton(photos, tmp_path / "p.beton", encoding=jpeg(), workers=3)
    assert not (tmp_path / "p.beton").exists()


def damaged_jpeg(tmp_path: Path, how: str) -> Path:
    """A .beton of four JPEG images, the third damaged, and no checksum that would tell."""
    images = np.stack([np.asarray(smooth_photo(48, 48, seed)) for seed in range(4)])
    path = tmp_path / "j.beton"
    write_beton(ImageSet(images, np.arange(4), 4, "photos"), path, encoding=jpeg())
    checksum_path(path).unlink()
    file = inspect(path)
    place, size = int(file.places[2]), int(file.sizes[2])
    data = bytearray(path.read_bytes())
    if how == "zeroed":
        data[place + size // 2 : place + size] = bytes(size - size // 2)
    elif how == "no JPEG":
        data[place : place + 20] = bytes(20)
    else:
        buffer = io.BytesIO()
        smooth_photo(24, 24, 9).save(buffer, "JPEG", quality=70)
        other = buffer.getvalue()
        assert len(other) <= size
        data[place : place + len(other)] = other
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["zeroed", "no JPEG", "another size"])
@pytest.mark.parametrize("loader", ["torchvision", pytest.param("ffcv", marks=needs_ffcv)])
def test_damaged_jpeg_inside_a_file_is_named(how: str, loader: str, tmp_path: Path) -> None:
    from arat_fast.loaders.choose import open_stream

    source = load_beton(damaged_jpeg(tmp_path, how))
    stream = open_stream(loader, source, batch_size=2, seed=0, device=CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the image 2 of .*j\.beton"):
        list(stream.epoch(1))
