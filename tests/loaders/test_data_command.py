"""`arat-fast data prepare` and `check`, then training from what they wrote, on real data; `bench loaders`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import SHARED
from small_data import needs_ffcv, photo_folder, random_images, raw_beton

from arat_fast import cli
from arat_fast.loaders.beton import checksum_path
from arat_fast.loaders.beton_set import BetonSet
from arat_fast.loaders.sources import load, load_original

SHORT = [
    "--epochs", "1", "--batch-size", "32", "--attack.steps", "1", "--evaluation.steps", "1",
    "--evaluation.limit", "32", "--model", "resnet8", "--device", "cpu", "--workers", "2",
]  # fmt: skip


def arat_fast(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prepared_cifar(cifar_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CIFAR-10 in .beton files."""
    out = tmp_path_factory.mktemp("prepared")
    assert arat_fast("data", "prepare", "--dataset", "cifar10", "--data-root", cifar_root, "--out", out) == 0
    return out


def test_real_cifar10_comes_back_exactly(prepared_cifar: Path, cifar_root: Path) -> None:
    train, test = load("cifar10", str(prepared_cifar))
    first, second = load_original("cifar10", str(cifar_root))
    assert isinstance(train, BetonSet)
    assert np.array_equal(train.in_memory().images, first.in_memory().images)
    assert np.array_equal(test.images, second.in_memory().images)
    assert np.array_equal(train.labels, first.labels)
    assert train.file.description["dataset"] == "cifar10"


@needs_ffcv
def test_real_cifar10_trains_through_ffcv_as_through_the_others(prepared_cifar: Path, tmp_path: Path) -> None:
    lines = []
    for loader in ("ffcv", "resident", "torchvision"):
        run = tmp_path / loader
        settings = ["--dataset", "cifar10", "--data-root", prepared_cifar, "--limit-train", 96]
        assert arat_fast("train", *settings, "--loader", loader, *SHORT, "--run-dir", run) == 0
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if "second" not in k} for line in metrics])
    assert lines[0] == lines[1] == lines[2]  # the same loss to the last digit
    assert (tmp_path / "ffcv" / "results.json").exists()


@needs_ffcv
def test_real_photos_are_prepared_trained_on_and_evaluated(tmp_path: Path) -> None:
    where = SHARED / "photos_sign_digits"
    if not where.is_dir():
        pytest.skip(f"the real photos are not at {where}")
    out = tmp_path / "beton"
    assert arat_fast("data", "prepare", "--dataset", "folder", "--data-root", where, "--out", out) == 0
    settings = ["--dataset", "folder", "--data-root", out, "--image-size", 32, "--padding", 0]
    run = tmp_path / "run"
    assert arat_fast("train", *settings, "--loader", "ffcv", *SHORT, "--run-dir", run) == 0
    line = json.loads((run / "metrics.jsonl").read_text())
    assert 1.5 < line["loss"] < 50
    assert json.loads((run / "results.json").read_text())["arat"]["n"] == 32


def test_check_describes_files_and_names_the_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_beton(tmp_path, random_images())
    path = tmp_path / "images.beton"
    assert arat_fast("data", "check", path) == 0
    assert "203 images, 16x16, 100% raw, checksum matches" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert arat_fast("data", "check", path) == 2
    assert f"{path} has" in capsys.readouterr().err
    assert arat_fast("data", "check") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar11"], "did you mean 'cifar10'"),
        (["--dataset", "digits"], "has 1 channel"),
        (["--dataset", "folder", "--quality", "0"], "--quality is 0; expected 1 to 100"),
        (["--dataset", "folder", "--raw-share", "2"], "--raw-share is 2.0; expected 0 to 1"),
        (["--dataset", "folder", "--data-root", "nowhere"], "holds no train/"),
    ],
)
def test_prepare_names_mistakes(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arat_fast("data", "prepare", "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_prepared_files_that_do_not_belong_together_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, classes in (("train", 3), ("test", 2)):
        root = photo_folder(tmp_path / name, classes)
        out = tmp_path / "out"
        assert arat_fast("data", "prepare", "--dataset", "folder", "--data-root", root, "--out", out) == 0
        if name == "train":
            kept = {p.name: p.read_bytes() for p in out.glob("*-train.beton*")}
    for file, content in kept.items():
        (out / file).write_bytes(content)
    assert arat_fast("train", "--dataset", "folder", "--data-root", out, *SHORT) == 2
    assert "has 3 classes and" in capsys.readouterr().err
    checksum_path(out / "folder-test.beton").unlink()
    (out / "folder-test.beton").unlink()
    assert arat_fast("train", "--dataset", "folder", "--data-root", out, *SHORT) == 2
    assert "folder-test.beton: No such file" in capsys.readouterr().err


def test_bench_loaders_writes_figures_and_their_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "loaders.json"
    arguments = ["--images", 600, "--repeats", 1, "--batch-size", 64, "--device", "cpu", "--json", file]
    assert arat_fast("bench", "loaders", *arguments) == 0
    result = json.loads(file.read_text())
    assert {"torchvision", "resident"} <= set(result["loaders"])
    assert result["loaders"]["torchvision"]["ratio"] == 1
    for figures in result["loaders"].values():
        assert figures["images_per_second"] > 0
    assert result["conditions"]["images"] == 600
    assert result["conditions"]["packages"]["torch"]
    assert "images/s" in capsys.readouterr().out
    assert arat_fast("bench", "loaders", "--repeats", 0) == 2
