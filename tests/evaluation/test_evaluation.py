"""Accuracy under attack, AutoAttack's resumption, masking checks, and records that can be quoted."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arat_fast import reference
from arat_fast.cli import main
from arat_fast.config import TrainConfig
from arat_fast.errors import TrainingError, UserError
from arat_fast.evaluation import autoattack as autoattack_module
from arat_fast.evaluation import results as results_module
from arat_fast.evaluation.accuracy import batches, clean_correct, pgd_correct
from arat_fast.evaluation.autoattack import autoattack_correct
from arat_fast.evaluation.network import load_run
from arat_fast.evaluation.options import EvaluationOptions, check_attacks
from arat_fast.evaluation.record import binomial_error, check_writable, write_json
from arat_fast.evaluation.results import evaluate_run, summary
from arat_fast.evaluation.sanity import sanity_checks
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")
EPS = {"eps": 0.12, "alpha": 0.03}


@pytest.fixture(scope="module")
def trained(digits: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few epochs of ARAT on all digits: enough to be partly robust."""
    from arat_fast.config import load_recipe

    config = load_recipe("digits")
    attack = dataclasses.replace(config.attack, steps=4)
    config = dataclasses.replace(config, epochs=6, drops=(5,), attack=attack, device="cpu")
    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(config, digits[0], folder).run()
    return folder


class Quantised(nn.Module):
    """A network behind rounding of its input: no gradient reaches the pixels. The classic masked model."""

    def __init__(self, network: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * self.levels).round() / self.levels)


def test_clean_accuracy_against_a_direct_count(trained: Path, digits: tuple[ImageSet, ImageSet]) -> None:
    network = load_run(trained, CPU).network
    network.train()
    correct = clean_correct(network, digits[1], batch_size=100, device=CPU)
    assert network.training  # put back
    network.eval()
    reference.use_branch(network, "adv")
    images = torch.from_numpy(digits[1].images).permute(0, 3, 1, 2).float() / 255
    direct = network(images).argmax(1) == torch.from_numpy(digits[1].labels)
    assert torch.equal(correct, direct)
    assert correct.float().mean() > 0.8


def test_more_restarts_and_a_larger_ball_never_help_the_defender(
    trained: Path, digits: tuple[ImageSet, ImageSet]
) -> None:
    network, data = load_run(trained, CPU).network, digits[1].first(100)
    one = pgd_correct(network, data, **EPS, steps=10, device=CPU)
    three = pgd_correct(network, data, **EPS, steps=10, restarts=3, device=CPU)
    finished: list[int] = []
    batched = {"batch_size": 30, "progress": finished.append}
    wide = pgd_correct(network, data, eps=0.4, alpha=0.1, steps=10, device=CPU, **batched)
    assert finished == [30, 30, 30, 10]
    margin = pgd_correct(network, data, **EPS, steps=10, loss="margin", device=CPU)
    assert not (three & ~one).any()
    assert wide.sum() <= one.sum() < clean_correct(network, data, device=CPU).sum()
    assert abs(int(margin.sum()) - int(one.sum())) < 20
    again = pgd_correct(network, data, **EPS, steps=10, device=CPU)
    assert torch.equal(one, again)


def test_images_are_given_in_the_pixel_range() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    data = ImageSet(images, np.arange(4), 10, "levels")
    found = list(batches(data, 3, CPU))
    assert [(offset, len(x), labels.tolist()) for offset, x, labels in found] == [
        (0, 3, [0, 1, 2]),
        (3, 1, [3]),
    ]
    given = torch.cat([x for _, x, _ in found])
    assert torch.equal(given, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


def test_binomial_error() -> None:
    """An end of the interval is the probability that lies 1.96 of its own standard errors away."""
    assert binomial_error(0.5, 1000) == pytest.approx(0.031, abs=1e-3)
    for correct, count in [(0, 200), (1, 200), (50, 200), (85, 100), (9, 10), (10, 10)]:
        accuracy = correct / count
        error = binomial_error(accuracy, count)
        end = accuracy + error if accuracy < 0.5 else accuracy - error
        assert error == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count))
        assert binomial_error(1 - accuracy, count) == pytest.approx(error)


@pytest.mark.slow
def test_autoattack_is_at_least_as_strong_as_pgd_and_resumes(
    trained: Path,
    digits: tuple[ImageSet, ImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network, data = load_run(trained, CPU).network, digits[1].first(40)
    options = {"eps": 0.12, "iterations": 10, "queries": 100, "device": CPU}
    with caplog.at_level(logging.INFO):
        robust = autoattack_correct(network, data, **options)
    assert len(caplog.messages) == 4
    assert all(message.startswith("AutoAttack: robust accuracy after ") for message in caplog.messages)
    pgd = pgd_correct(network, data, **EPS, steps=20, device=CPU)
    assert int(robust.sum()) <= int(pgd.sum()) + 1
    assert 0 < int(robust.sum()) < 40
    # Cut short after the first of two batches, it goes on with the second: to the same verdicts.
    from pyautoattack import AutoAttack

    original, calls = AutoAttack.run_standard_evaluation, 0

    def once(self: AutoAttack, *arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    halves = options | {"batch_size": 20}
    whole = autoattack_correct(network, data, **halves)
    state = tmp_path / "state" / "aa.json"
    with monkeypatch.context() as patch:
        patch.setattr(AutoAttack, "run_standard_evaluation", once)
        with pytest.raises(KeyboardInterrupt):
            autoattack_correct(network, data, **halves, state_file=state)
        assert len(json.loads(state.read_text())["robust"]) == 20
        assert torch.equal(autoattack_correct(network, data, **halves, state_file=state), whole)
        assert calls == 3
        # Finished: no attack runs again.
        assert torch.equal(autoattack_correct(network, data, **halves, state_file=state), whole)
        assert calls == 3
    # A damaged state file is not taken for an evaluation.
    state.write_text(state.read_text()[:50])
    assert torch.equal(autoattack_correct(network, data, **halves, state_file=state), whole)


def test_autoattack_iterations_reach_every_part(
    trained: Path, digits: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyautoattack import AutoAttack

    seen = {}

    def stop(self: AutoAttack, *_args: object, **_options: object) -> None:
        seen.update(
            apgd=(self.apgd.n_iter, self.apgd.n_iter_2, self.apgd.n_restarts),
            targeted=(self.apgd_targeted.n_iter, self.apgd_targeted.n_target_classes),
            fab=(self.fab.n_iter, self.fab.n_target_classes),
            square=self.square.n_queries,
            attacks=self.attacks_to_run,
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", stop)
    network, data = load_run(trained, CPU).network, digits[1].first(4)
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.propagate, list(logger.handlers)
    paper = {"iterations": autoattack_module.PAPER_ITERATIONS}
    for options, iterations, second in (({}, 100, 22), (paper, 10, 2)):
        with pytest.raises(KeyboardInterrupt):
            autoattack_correct(network, data, eps=0.1, device=CPU, **options)
        assert (logger.level, logger.propagate, list(logger.handlers)) == before
        assert seen == {
            "apgd": (iterations, second, 1),
            "targeted": (iterations, 9),
            "fab": (iterations, 9),
            "square": 5000,
            "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
        }


def test_autoattack_needs_ten_classes(trained: Path) -> None:
    few = ImageSet(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64), 3, "few")
    with pytest.raises(UserError, match="need 10 classes, the data has 3"):
        autoattack_correct(load_run(trained, CPU).network, few, eps=0.1, device=CPU)


@pytest.mark.slow
def test_sanity_checks_pass_on_the_run_and_warn_on_a_masked_model(
    trained: Path, digits: tuple[ImageSet, ImageSet]
) -> None:
    network, data = load_run(trained, CPU).network, digits[1].first(60)
    checks = sanity_checks(network, data, **EPS, device=CPU)
    assert [c.passed for c in checks] == [True] * 4, [c.figures for c in checks]
    masked = sanity_checks(Quantised(network), data, **EPS, device=CPU)
    verdicts = {c.name: c.passed for c in masked}
    assert not verdicts["accuracy falls to about zero as eps grows"]
    assert not verdicts["black-box (Square) is not stronger than white-box"]
    assert not verdicts["loss rises along the attack"]


def test_a_record_holds_what_is_needed_to_quote_it(
    trained: Path, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    record = evaluate_run(
        trained, digits[1], ["clean", "pgd3"], device=CPU, options=EvaluationOptions(limit=50, restarts=2)
    )
    assert {"checkpoint_sha256", "epochs", "branch", "bn", "dataset", "config", "environment", "date"} <= set(
        record
    )
    figure = record["figures"]["pgd3"]
    assert (figure["n"], figure["restarts"], figure["steps"], figure["norm"]) == (50, 2, 3, "Linf")
    p = figure["correct"] / 50
    assert figure["accuracy"] == pytest.approx(p)
    assert figure["error_95"] == binomial_error(p, 50)
    assert summary(record) == {
        "clean": record["figures"]["clean"]["accuracy"],
        "clean_branch": record["figures"]["clean_branch"]["accuracy"],
        "pgd3": figure["accuracy"],
        "n": 50,
    }
    write_json(tmp_path / "record.json", record)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    with pytest.raises(TrainingError, match="cannot write"):
        write_json(tmp_path / "absent" / "record.json", record)


def test_where_a_record_goes_is_looked_at_first(tmp_path: Path) -> None:
    check_writable(None)
    check_writable(tmp_path / "made" / "record.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        check_writable(tmp_path / "file" / "record.json")


def test_a_record_takes_no_other_files_place(tmp_path: Path) -> None:
    check_writable(tmp_path / "results.json")  # no run is here
    for name in ("config.json", "old.json", "environment.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty.json").touch()
    for name in ("old.json", "empty.json", "new.json"):
        check_writable(tmp_path / name)
    for name in ("config.json", "environment.json", "results.json", "metrics.jsonl"):
        with pytest.raises(UserError, match=rf"{name} is one of the run's own files; choose another name"):
            check_writable(tmp_path / name)
    contents = {"last.pt": b"1", "analysis.jsonl": b"1", "notes.txt": b"mine", "image.json": b"\xff\xfe"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} exists .* choose another name"):
            check_writable(tmp_path / name)


def test_verdicts_of_other_images_are_not_taken(
    trained: Path, digits: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []

    def seen(network: nn.Module, data: ImageSet, *, state_file: Path, **_options: object) -> Tensor:
        files.append(state_file)
        return torch.ones(len(data), dtype=torch.bool)

    monkeypatch.setattr(results_module, "autoattack_correct", seen)
    one, other = digits[1].take(np.arange(6)), digits[1].take(np.arange(6, 12))
    relabelled = dataclasses.replace(one, labels=(one.labels + 1) % 10)
    for data, size in ((one, None), (one, None), (other, None), (relabelled, None), (one, 3)):
        options = EvaluationOptions(batch_size=size)
        evaluate_run(trained, data, ["autoattack"], device=CPU, options=options)
    assert files[0] == files[1]
    assert len(set(files)) == 4


def test_the_given_batch_size_is_the_clean_figures_too(
    trained: Path, digits: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def seen(network: nn.Module, data: ImageSet, *, batch_size: int, **_options: object) -> Tensor:
        sizes.append(batch_size)
        return torch.ones(len(data), dtype=torch.bool)

    monkeypatch.setattr(results_module, "clean_correct", seen)
    evaluate_run(trained, digits[1].first(6), ["clean"], device=CPU, options=EvaluationOptions(batch_size=3))
    assert sizes == [3, 3]


def test_outputs_that_are_not_finite_are_no_accuracy(
    trained: Path, digits: tuple[ImageSet, ImageSet]
) -> None:
    network, data = load_run(trained, CPU).network, digits[1].first(6)
    with torch.no_grad():
        network.get_parameter("linear.weight")[0, 0] = math.nan
    for measure in (
        lambda: clean_correct(network, data, device=CPU),
        lambda: pgd_correct(network, data, **EPS, steps=1, device=CPU),
        lambda: autoattack_correct(network, data, eps=0.1, device=CPU),
    ):
        with pytest.raises(TrainingError, match="outputs are not finite"):
            measure()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("restarts", 0),
        ("restarts", -1),
        ("batch_size", 0),
        ("batch_size", -5),
        ("seed", -1),
        ("seed", 2**31),
        ("limit", -3),
        ("eps", -0.1),
        ("eps", math.nan),
        ("alpha", math.inf),
    ],
)
def test_numbers_out_of_range_are_named(
    name: str, value: float, trained: Path, digits: tuple[ImageSet, ImageSet]
) -> None:
    options = EvaluationOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}; expected at least"):
        evaluate_run(trained, digits[1], ["clean"], device=CPU, options=options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--restarts", "0"], "--restarts is 0"),
        (["--attacks", ""], "--attacks names no attack"),
        (["--batch-size", "-5"], "--batch-size is -5"),
        (["--seed", "-1"], "--seed is -1"),
        (["--limit", "-3"], "--limit is -3"),
        (["--sanity", "--limit", "-3"], "--limit is -3"),
        (["--sanity", "--attacks", "clean"], "leave --attacks out"),
        (["--sanity", "--restarts", "2"], "leave --restarts out"),
        (["--sanity", "--seed", "1"], "leave --seed out"),
        (["--sanity", "--batch-size", "5"], "leave --batch-size out"),
        (["--json", "RUN/last.pt"], "choose another name"),
    ],
)
def test_flags_that_would_be_misread_are_refused(
    flags: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), *(flag.replace("RUN", str(trained)) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_table_says_what_it_holds_for(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--attacks", "clean,pgd1", "--limit", "9", "--eps", "8/255"]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note == "Linf 8/255, weights last, n = 9 test images; ± is the 95 % binomial error"


def test_damaged_metrics_are_found_before_anything_is_measured(
    trained: Path, digits: tuple[ImageSet, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(results_module, "load_run", None)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for damaged in ("[]\n", "5\n", '{"epoch": 1}\n'):
        metrics.write_text(damaged)
        with pytest.raises(UserError, match=r"metrics.jsonl, line 1, is damaged: .* remove the line"):
            evaluate_run(tmp_path / "run", digits[1], ["clean"], device=CPU)
    metrics.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl"):
        evaluate_run(tmp_path / "run", digits[1], ["clean"], device=CPU)


def test_wrong_requests_are_named(trained: Path, digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown attack 'pdg20': did you mean 'pgd20'"):
        check_attacks(["clean", "pdg20"])
    with pytest.raises(UserError, match=r"has no swa weights \(it has: last\)"):
        load_run(trained, CPU, "swa")
    with pytest.raises(UserError, match=r"no checkpoint at .*best.pt"):
        load_run(trained, CPU, "best")
    colour = ImageSet(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64), 10, "colour")
    with pytest.raises(UserError, match=r"was trained on images of \(8, 8, 1\) in 10 classes; colour has"):
        evaluate_run(trained, colour, ["clean"], device=CPU)


def test_a_checkpoint_of_another_network_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["model"] = "resnet18"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the network"):
        load_run(other, CPU)
    (other / "config.json").write_text("{}}")
    with pytest.raises(UserError, match=r"not valid (YAML|JSON)"):
        load_run(other, CPU)
    (other / "config.json").unlink()
    with pytest.raises(UserError, match="no run directory"):
        load_run(other, CPU)


def test_validation_keeps_the_best_checkpoint(
    tiny_config: TrainConfig, digits: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    trainer = Trainer(dataclasses.replace(tiny_config, validation=30), digits[0], tmp_path / "run")
    trainer.run()
    lines = trainer.directory.metrics()
    best = max(range(len(lines)), key=lambda k: lines[k]["validation_pgd"])
    assert load_run(tmp_path / "run", CPU, "best").epochs == best + 1
    assert len(trainer.train_images) == 96 - 30
