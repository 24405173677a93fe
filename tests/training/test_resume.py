"""Interrupted anywhere, a run ends with the weights of one that was not: bit for bit, on CPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from arat_fast.config import TrainConfig
from arat_fast.errors import StopRequested, TrainingError, UserError
from arat_fast.loaders.images import ImageSet
from arat_fast.loaders.sources import load
from arat_fast.training import attack_pass, checkpoint, fast_engine, step
from arat_fast.training import trainer as trainer_module
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint
from arat_fast.training.directory import RunDirectory
from arat_fast.training.trainer import Trainer


def train(config: TrainConfig, data: ImageSet, folder: Path, **options: bool) -> Trainer:
    trainer = Trainer(config, data, folder, **options)
    trainer.run()
    return trainer


def assert_same_state(a: dict, b: dict, path: str = "") -> None:
    """Equal to the last bit, but for timings and for random numbers that this network does not draw."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "wall_seconds", "config", "random"):
                assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def without_timing(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "wall_seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    averaging = dataclasses.replace(tiny_config.averaging, swa_start=2, swa_every=2, ema_decay=0.9)
    return dataclasses.replace(tiny_config, averaging=averaging, validation=20)


@pytest.fixture
def whole(config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> Path:
    train(config, digits[0], tmp_path / "whole")
    return tmp_path / "whole"


class InterruptAfter:
    """Asks the run to stop after `count` iterations, as Ctrl-C does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        original = Trainer._iterate

        def iterate(trainer: Trainer, batch: object) -> None:
            nonlocal count
            original(trainer, batch)  # type: ignore[arg-type]
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Trainer, "_iterate", iterate)


@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(
    config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        InterruptAfter(patch, after)
        with pytest.raises(StopRequested) as stop:
            train(config, digits[0], folder)
    assert stop.value.exit_code == 130
    train(config, digits[0], folder, resume=True)
    assert_same_state(load_checkpoint(whole / "last.pt"), load_checkpoint(folder / "last.pt"))
    assert_same_state(load_checkpoint(whole / "best.pt"), load_checkpoint(folder / "best.pt"))
    assert without_timing(whole) == without_timing(folder)


def test_a_run_stopped_before_an_epoch_s_last_batch_compiles_for_whole_ones(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """76 images: 32, 32 and 12. What compiles is left out: only for which batches counts."""
    for module in (step, attack_pass):
        monkeypatch.setattr(module, "compiled_pass", lambda function, joined: function)
    monkeypatch.setattr(fast_engine, "has_bf16_matrix_units", lambda device: True)
    config = dataclasses.replace(config, engine="fast", compile=True, precision="fp32")
    with monkeypatch.context() as patch:
        InterruptAfter(patch, 2)
        with pytest.raises(StopRequested):
            train(config, digits[0], tmp_path)
    resumed = train(config, digits[0], tmp_path, resume=True).engine
    assert isinstance(resumed, fast_engine.FastEngine)
    assert resumed.step.is_compiled(32)
    few = Trainer(dataclasses.replace(config, limit_train=30), digits[0], tmp_path / "few")
    few.run()  # fewer images than a batch: those are the whole one
    assert isinstance(few.engine, fast_engine.FastEngine)
    assert few.engine.step.is_compiled(10)


def test_wall_seconds_hold_what_training_s_seconds_leave_out(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.2 s of balance before an epoch and 0.3 s of validation after it; a stop and a restart between."""
    balance, validate = Trainer._balance, Trainer._validate

    def slow_balance(trainer: Trainer) -> float | None:
        time.sleep(0.2)
        return balance(trainer)

    def slow_validation(trainer: Trainer, images: ImageSet) -> dict[str, float]:
        time.sleep(0.3)
        return validate(trainer, images)

    monkeypatch.setattr(Trainer, "_balance", slow_balance)
    monkeypatch.setattr(Trainer, "_validate", slow_validation)
    folder = tmp_path / "run"
    started = time.perf_counter()
    with monkeypatch.context() as patch:
        InterruptAfter(patch, 2)
        with pytest.raises(StopRequested):
            train(config, digits[0], folder)
    stopped = load_checkpoint(folder / "last.pt")
    assert stopped["wall_seconds"] >= stopped["seconds"] + 0.2
    train(config, digits[0], folder, resume=True)
    whole = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["wall_seconds"] >= line["seconds"] + 0.5 for line in lines)
    assert sum(line["wall_seconds"] for line in lines) <= whole


def test_a_checkpoint_from_before_wall_seconds_resumes(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    state = load_checkpoint(whole / "last.pt")
    del state["wall_seconds"], state["format"]
    save_checkpoint(whole / "last.pt", state)
    assert train(dataclasses.replace(config, epochs=4), digits[0], whole, resume=True).epoch == 5


class Killed(Exception):
    pass


@pytest.mark.parametrize("validation", [0, 20])
def test_checkpoints_are_apart_and_what_comes_after_one_is_trained_again(
    config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    validation: int,
) -> None:
    saved: list[int] = []
    save, begin = Trainer.save, Trainer._train_epoch

    def noted(trainer: Trainer) -> None:
        saved.append(trainer.epoch - 1)
        save(trainer)

    def tick(trainer: Trainer, signals: object) -> None:
        trainer._saved_at -= 10.0  # 10 s an epoch
        begin(trainer, signals)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "save", noted)
    monkeypatch.setattr(Trainer, "_train_epoch", tick)
    config = dataclasses.replace(config, averaging=TrainConfig().averaging, epochs=8, validation=validation)
    whole = train(config, digits[0], tmp_path / "whole")
    expected, best, last = [], -1.0, -2
    for line in without_timing(tmp_path / "whole"):
        is_best, best = line.get("validation_pgd", -1.0) > best, max(best, line.get("validation_pgd", -1.0))
        if is_best or line["epoch"] in (last + 3, 8):
            last = line["epoch"]
            expected.append(last)
    assert best == whole.best_accuracy
    assert saved == expected
    assert validation or saved == [1, 4, 7, 8]

    def end(trainer: Trainer, signals: object) -> None:
        if trainer.epoch == 6:
            raise Killed
        tick(trainer, signals)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", end)
        with pytest.raises(Killed):
            train(config, digits[0], tmp_path / "killed")
    assert len(without_timing(tmp_path / "killed")) == 5
    assert load_checkpoint(tmp_path / "killed" / "last.pt")["epoch"] == saved[-1] + 1 < 7
    train(config, digits[0], tmp_path / "killed", resume=True)
    assert without_timing(tmp_path / "whole") == without_timing(tmp_path / "killed")
    last, again = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert_same_state(last, again)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        (killed / name).write_bytes((whole / name).read_bytes())
    train(config, digits[0], killed, resume=True)
    assert without_timing(whole) == without_timing(killed)
    assert_same_state(load_checkpoint(whole / "last.pt"), load_checkpoint(killed / "last.pt"))


def _train_in_child(config: TrainConfig, folder: Path, save_every: float) -> None:
    torch.set_num_threads(1)
    trainer_module.SAVE_EVERY = save_every
    train(config, load("digits")[0], folder, resume=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_nine_at_twenty_random_moments(config: TrainConfig, tmp_path: Path) -> None:
    # A fork server that has torch loaded: each child starts in milliseconds, and dies alone.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["arat_fast.training.trainer", "sklearn.datasets"])
    config = dataclasses.replace(config, epochs=12)

    def start(folder: Path, save_every: float = 0.0) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_train_in_child, args=(config, folder, save_every))
        process.start()
        return process

    for name in ("loads what is imported", "whole"):
        started = time.perf_counter()
        process = start(tmp_path / name)
        process.join()
        duration = time.perf_counter() - started
        assert process.exitcode == 0
    whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    moments, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"killed{rounds}"
        save_every = 0.2 * duration * (rounds % 2)  # checkpoints after each epoch, or some
        rounds += 1
        finished = False
        while not finished:
            process = start(folder, save_every)
            process.join(moments.uniform(0, 0.7 * duration) if kills < 20 else None)
            finished = process.exitcode is not None
            if not finished:
                process.kill()
                process.join()
                kills += 1
                if (folder / "last.pt").exists():
                    load_checkpoint(folder / "last.pt")  # readable, always
            else:
                assert process.exitcode == 0
        assert_same_state(whole, load_checkpoint(folder / "last.pt"))
        assert without_timing(tmp_path / "whole") == without_timing(folder)


def test_resume_of_a_complete_run_changes_nothing(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    before = (whole / "last.pt").read_bytes()
    train(config, digits[0], whole, resume=True)
    assert (whole / "last.pt").read_bytes() == before


def test_resume_may_extend_a_run(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    config = dataclasses.replace(config, averaging=TrainConfig().averaging)
    train(dataclasses.replace(config, epochs=4), digits[0], tmp_path / "long")
    train(dataclasses.replace(config, epochs=2), digits[0], tmp_path / "short")
    train(dataclasses.replace(config, epochs=4), digits[0], tmp_path / "short", resume=True)
    long, short = (load_checkpoint(tmp_path / name / "last.pt") for name in ("long", "short"))
    assert_same_state(long, short)


def test_what_a_resume_changes_is_recorded(
    config: TrainConfig,
    digits: tuple[ImageSet, ImageSet],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = dataclasses.replace(config.evaluation, steps=1)
    longer = dataclasses.replace(config, epochs=5, evaluation=evaluation)
    with monkeypatch.context() as patch:
        InterruptAfter(patch, 1)
        with pytest.raises(StopRequested, match="stopped in epoch 4 of 5"):
            train(longer, digits[0], whole, resume=True)
    recorded = RunDirectory(whole).config()
    assert (recorded.epochs, recorded.evaluation.steps) == (5, 1)
    assert train(recorded, digits[0], whole, resume=True).epoch == 6
    assert not list(whole.glob("*.tmp"))


def test_finished_epochs_cannot_be_taken_back(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    with pytest.raises(UserError, match="has finished 3 epochs already, --epochs 2 cannot"):
        Trainer(dataclasses.replace(config, epochs=2), digits[0], whole, resume=True)
    assert RunDirectory(whole).config().epochs == 3


def test_resume_under_another_configuration_is_refused(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    other = dataclasses.replace(config, learning_rate=0.5, seed=7)
    before = (whole / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"learning_rate was 0\.02 and is now 0\.5; seed was 0 and is now 7"):
        Trainer(other, digits[0], whole, resume=True)
    assert (whole / "last.pt").read_bytes() == before


def test_resume_with_other_data_is_refused(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    with pytest.raises(UserError, match="was trained on 76 images, the data set now has 60"):
        Trainer(config, digits[0].first(80), whole, resume=True)


def test_two_processes_cannot_hold_one_run(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    holder = Trainer(config, digits[0], whole, resume=True)
    assert holder.directory.is_held()
    with pytest.raises(UserError, match="being written by another process"):
        Trainer(config, digits[0], whole, resume=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (whole / "last.pt").read_bytes()

    def no_space(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", no_space)
    with pytest.raises(TrainingError, match="No space left on device; the previous checkpoint is intact"):
        save_checkpoint(whole / "last.pt", {"weights": torch.zeros(10)})
    assert (whole / "last.pt").read_bytes() == before
    assert not list(whole.glob("*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        save_checkpoint(disk / "last.pt", {"weights": torch.zeros(1000)})
        with pytest.raises(TrainingError, match="the previous checkpoint is intact"):
            save_checkpoint(disk / "last.pt", {"weights": torch.zeros(10**6)})
        assert torch.load(disk / "last.pt", weights_only=True)["weights"].numel() == 1000
        assert [p.name for p in disk.iterdir()] == ["last.pt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoints_are_refused(whole: Path, tmp_path: Path, keep: float) -> None:
    content = (whole / "last.pt").read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep
    (tmp_path / "cut.pt").write_bytes(content[:length])
    with pytest.raises(UserError, match=r"cut.pt is not a readable checkpoint"):
        load_checkpoint(tmp_path / "cut.pt")


def test_foreign_and_newer_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="of another program"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="format 99; this one reads 1"):
        load_checkpoint(tmp_path / "newer.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # needs code to load: never run
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "module.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_checkpoint_without_one_of_its_entries_is_refused(whole: Path, tmp_path: Path) -> None:
    state = load_checkpoint(whole / "last.pt")
    assert set(state) == {"format", "wall_seconds", "random", *checkpoint.ENTRIES}
    for name in checkpoint.ENTRIES:
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "less.pt")
        with pytest.raises(UserError, match=rf"less.pt lacks {name}: .* damaged"):
            load_checkpoint(tmp_path / "less.pt")


def test_metrics_that_a_crash_cut_short_are_repaired(
    config: TrainConfig, digits: tuple[ImageSet, ImageSet], whole: Path
) -> None:
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')
    Trainer(config, digits[0], whole, resume=True)
    assert [line["epoch"] for line in without_timing(whole)] == [1, 2, 3]
