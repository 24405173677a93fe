"""What a configuration is refused for before anything is written, from code and from `--dry-run`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from arat_fast.commands.train import main as train_command
from arat_fast.config import AttackConfig, TrainConfig
from arat_fast.errors import UserError
from arat_fast.loaders import sources
from arat_fast.loaders.images import ImageSet
from arat_fast.models import create_model
from arat_fast.training.checks import check_counts, checked, warn_of_radius
from arat_fast.training.trainer import Trainer

TINY = ["--config", "digits", "--epochs", "1", "--limit-train", "66", "--batch-size", "33",
        "--attack.steps", "1", "--device", "cpu", "--no-compile", "--evaluation.steps", "1",
        "--evaluation.limit", "33"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "reference", "--method", "trades"], "--engine reference knows arat and standard"),
        (["--engine", "reference", "--emr.coefficient", "0.1"], "not emr"),
        (["--engine", "reference", "--attack.branch", "clean"], "attacks with branch adv"),
        (["--method", "arrest"], "needs --arrest.teacher"),
        (["--method", "arrest", "--arrest.teacher", "nowhere"], "nowhere is no run directory"),
        (["--method", "at", "--attack.branch", "clean"], "--attack.branch clean: the network of method at"),
        (["--arat.no-split-bn", "--attack.branch", "clean"], "the one branch adv"),
        (["--limit-train", "0", "--validation", "2000"], "cannot hold out 2000 of 1442"),
        (["--limit-train", "67"], "last batch of one"),
        (["--averaging.swa-start", "2"], "beyond the 1 epochs"),
        (["--method", "standard", "--emr.coefficient", "0.1"], "has no adversarial images"),
        (["--attack.eps", "8"], "write 8/255"),
        (["--resume"], "--resume needs --run-dir"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        train_command([*TINY, *flags, "--dry-run"])
    assert capsys.readouterr().out == ""


def test_a_dry_run_refuses_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here"):
        train_command([*TINY, "--device", "cuda", "--dry-run"])


def test_autoattack_is_checked_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*TINY, "--run-dir", str(tmp_path / "run"), "--autoattack"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyautoattack", None)  # as if it were not installed
        for more in ([], ["--dry-run"]):
            with pytest.raises(UserError, match="needs pyautoattack"):
                train_command([*arguments, *more])
    train, test = sources.load("digits")
    few = dataclasses.replace(test.take(np.flatnonzero(test.labels < 4)), num_classes=4)
    monkeypatch.setattr(sources, "load", lambda *_: (train, few))
    monkeypatch.setitem(sys.modules, "pyautoattack", sys)  # as if it were
    with pytest.raises(UserError, match="need 10 classes, the data has 4"):
        train_command(arguments)
    assert not (tmp_path / "run").exists()


def test_another_method_leaves_the_recorded_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    train_command([*TINY, "--run-dir", str(tmp_path / "run"), "--no-evaluate"])
    recorded = ["--config", str(tmp_path / "run" / "config.json"), "--method", "mail-trades", "--dry-run"]
    capsys.readouterr()
    train_command([*recorded, "--attack.bn", "batch"])
    printed = yaml.safe_load(capsys.readouterr().out.split("\n\n")[0])
    assert [printed["attack"][name] for name in ("loss", "start", "bn")] == ["kl", "normal", "batch"]
    assert (printed["mail"]["slope"], printed["mail"]["bias"]) == (2.0, 0.0)
    assert printed["attack"]["steps"] == 1


def test_resuming_a_finished_run_keeps_its_other_figures(tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "run" / "results.json"
    again = ["--run-dir", str(run), "--resume"]
    train_command([*TINY, "--run-dir", str(run), "--with-standard"])
    before = json.loads(results.read_text())
    before["arat"] |= {"autoattack": 0.1, "n": 20}
    results.write_text(json.dumps(before))
    train_command(again)
    assert json.loads(results.read_text()) == before
    train_command([*again, "--evaluation.eps", "0.05"])
    assert json.loads(results.read_text()).keys() == {"arat"}  # the others are of another ball
    train_command([*again, "--evaluation.eps", "0.05", "--epochs", "2"])
    results.write_text(json.dumps(before))
    train_command([*again, "--epochs", "3"])
    after = json.loads(results.read_text())
    assert "autoattack" not in after["arat"]  # of weights that are no more
    assert after["standard"] == before["standard"]


def test_a_radius_that_is_not_evaluated_is_named(
    tiny_config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def with_attack(**changes: Any) -> TrainConfig:
        return dataclasses.replace(tiny_config, attack=dataclasses.replace(tiny_config.attack, **changes))

    warn_of_radius(tiny_config)
    warn_of_radius(dataclasses.replace(with_attack(eps=0.3), method="standard"))
    warn_of_radius(TrainConfig(attack=AttackConfig(eps=0.031)))  # 8/255, as TRADES' authors write it
    assert not caplog.messages
    warn_of_radius(with_attack(eps=4 / 255))
    warn_of_radius(with_attack(norm="L2"))
    first, second = caplog.messages
    assert "Linf 4/255 (--attack.eps, --attack.norm), evaluation within Linf 0.12 (--evaluation.eps" in first
    assert "L2 0.12" in second


def test_a_configuration_from_code_is_checked(digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="epochs = -1"):
        Trainer(TrainConfig(method="at", epochs=-1), digits[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"--attack\.branch clean"):
        Trainer(TrainConfig(method="at", attack=AttackConfig(branch="clean")), digits[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert checked(TrainConfig()).attack.loss == "ce"


def test_counts_are_checked_after_limit_and_validation(caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(batch_size=32, limit_train=100, validation=4)
    check_counts(config, 1000)
    assert not caplog.messages
    with pytest.raises(UserError, match="cannot hold out 4 of 4"):
        check_counts(config, 4)
    with pytest.raises(UserError, match="33 training images in batches of 32"):
        check_counts(config, 37)
    check_counts(config, 38)
    assert "has only 2 images" in caplog.text


def test_the_folder_may_be_text(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    trainer = Trainer(tiny_config, digits[0], str(tmp_path / "run"))
    assert trainer.directory.path == tmp_path / "run"


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_named(label: int, tiny_config: TrainConfig, tmp_path: Path) -> None:
    labels = torch.arange(64) % 10
    labels[40] = label  # not in the first batch
    data = DataLoader(TensorDataset(torch.rand(64, 3, 8, 8), labels), batch_size=32)
    config = dataclasses.replace(tiny_config, method="at", limit_train=0)
    trainer = Trainer(config, run_dir=tmp_path, loaders=data, model=create_model("resnet8", 10, 3, ("adv",)))
    with pytest.raises(UserError, match=f"labels run from .*{label}"):
        trainer.run()


def test_labels_of_a_source_are_checked(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    wrong = dataclasses.replace(digits[0])
    object.__setattr__(wrong, "labels", digits[0].labels + 1)  # a source of one's own need not look
    with pytest.raises(UserError, match="labels run from 1 to 10"):
        Trainer(tiny_config, wrong, tmp_path / "run")
