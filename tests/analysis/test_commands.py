"""`arat-fast analyze` and `arat-fast compare` on tiny runs of real digits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from arat_fast.analysis.collect import Collector, collected
from arat_fast.analysis.labels import description, groups, short_names
from arat_fast.analysis.run import ANALYSES, AnalysisOptions, analyse_run
from arat_fast.cli import main
from arat_fast.config import TrainConfig, load_recipe, to_mapping
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.record import binomial_error
from arat_fast.evaluation.results import evaluate_run, summary
from arat_fast.loaders.images import ImageSet
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)


@pytest.fixture(scope="module")
def runs(digits: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One epoch each: ARAT, the naive loss with one BatchNorm, and ordinary training."""
    base = load_recipe("digits")
    base = dataclasses.replace(
        base,
        epochs=1,
        batch_size=32,
        limit_train=96,
        device="cpu",
        attack=dataclasses.replace(base.attack, steps=2),
        evaluation=dataclasses.replace(base.evaluation, steps=2),
    )
    naive = dataclasses.replace(base.arat, invariance="symmetric", predictor=False, split_bn=False)
    configs = {
        "arat": base,
        "naive": dataclasses.replace(base, arat=naive),
        "standard": dataclasses.replace(base, method="standard"),
    }
    folder = tmp_path_factory.mktemp("runs")
    for name, config in configs.items():
        trainer = Trainer(config, digits[0], folder / name)
        trainer.run()
        made = Collector(1, folder / name, config=config, channels=1, num_classes=10, device=CPU)
        for epoch in (1, 2):
            made.after_step(3 * epoch, epoch, state=trainer.engine.state, batch=small_batch)
            made.end_epoch(epoch, 3 * epoch, state=trainer.engine.state)
    return {name: folder / name for name in configs}


def test_analyze_one_run(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib

    settings = dict(matplotlib.rcParams)
    record = tmp_path / "all.json"
    arguments = ["analyze", str(runs["arat"]), "--limit", "24", "--batches", "2", "--json", str(record)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for part in ("stop-gradient, as trained", "naive", "layer3.0.conv2", "J running", "effective margin",
                 "Linf 0.12", "accuracy over eps", "written:"):  # fmt: skip
        assert part in out
    folder = runs["arat"] / "analysis"
    for name in ANALYSES:
        saved = json.loads((folder / f"{name}.json").read_text())
        assert saved["environment"]["packages"]["torch"]
        assert saved["runs"][0][name]
        assert len(saved["runs"][0]["checkpoint_sha256"]) == 64
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"conflict_by_layer", "conflict_over_training", "mixture_distance", "bn_divergence",
                        "bn_variance", "margin", "tradeoff", "accuracy_over_eps"}  # fmt: skip
    for path in folder.glob("*.p[dn][fg]"):
        assert path.read_bytes()[:4] in (b"%PDF", b"\x89PNG")
        assert path.stat().st_size > 3000
    assert b"/CIDFontType2" in (folder / "margin.pdf").read_bytes()  # publishers refuse Type 3 fonts
    assert dict(matplotlib.rcParams) == settings
    result = json.loads(record.read_text())["runs"][0]
    assert len(result["conflict"]["collected"]) == 2
    assert result["mixture"]["n"] == result["margin"]["n"] == result["tradeoff"]["clean"]["n"] == 24
    assert result["conflict"]["training_images"] == 64
    clean = result["epsilons"]["points"][0]
    assert clean["eps"] == 0
    assert clean["accuracy"] == result["tradeoff"]["clean"]["accuracy"]
    # A misclassified image has a margin below 0, and the other way round.
    assert 1 - result["margin"]["share_not_positive"] == pytest.approx(clean["accuracy"])
    at_radius = next(p for p in result["epsilons"]["points"] if p["eps"] == 0.12)
    assert at_radius == result["tradeoff"]["robust"]
    assert set(result["mixture"]["variance"]) == {"clean", "adv"}


def test_analyze_agrees_with_evaluate(runs: dict[str, Path], digits: tuple[ImageSet, ImageSet]) -> None:
    train, test = digits
    result = analyse_run(runs["arat"], train, test.first(50), ["tradeoff"], device=CPU)
    record = evaluate_run(runs["arat"], test.first(50), ["clean", "pgd2"], device=CPU)
    assert result["tradeoff"]["clean"]["accuracy"] == record["figures"]["clean"]["accuracy"]
    assert result["tradeoff"]["robust"]["accuracy"] == record["figures"]["pgd2"]["accuracy"]
    assert result["checkpoint_sha256"] == record["checkpoint_sha256"]


def test_analyze_several_runs(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    places = [str(path) for path in runs.values()]
    assert main(["analyze", *places, "--limit", "16", "--batches", "1"]) == 0
    out = capsys.readouterr().out
    assert "mean over layers" in out
    names = [run["label"] for run in json.loads((tmp_path / "analysis" / "mixture.json").read_text())["runs"]]
    assert names == ["arat", "arat, naive, no split BN", "standard"]
    conflict = json.loads((tmp_path / "analysis" / "conflict.json").read_text())["runs"]
    assert len(conflict) == 2  # ordinary training has no invariance term
    mixture = json.loads((tmp_path / "analysis" / "mixture.json").read_text())["runs"][1]["mixture"]
    assert mixture["layers"]["bn1"]["divergence"]["running"] is None
    assert set(mixture["variance"]) == {"adv"}


@pytest.mark.parametrize("method", ["at", "trades", "lbgat", "arat"])
def test_other_methods_and_emr(method: str, digits: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    config = load_recipe("digits")
    config = dataclasses.replace(
        config,
        method=method,
        epochs=1,
        batch_size=32,
        limit_train=64,
        device="cpu",
        attack=dataclasses.replace(config.attack, steps=1),
        evaluation=dataclasses.replace(config.evaluation, steps=1),
        lbgat=dataclasses.replace(config.lbgat, teacher="resnet8"),
        emr=dataclasses.replace(config.emr, coefficient=0.0 if method == "lbgat" else 0.01),
    )
    trainer = Trainer(config, digits[0], tmp_path / "run")
    trainer.run()
    names = [name for name in ANALYSES if name != "conflict" or method == "arat"]
    options = AnalysisOptions(limit=10, batches=1)
    result = analyse_run(tmp_path / "run", *digits, names, device=CPU, options=options)
    assert result["label"] == method + ("" if method == "lbgat" else " + EMR")
    assert result["mixture"]["split_bn"] == (method == "arat")
    made = Collector(1, tmp_path, config=trainer.config, channels=1, num_classes=10, device=CPU)
    made.after_step(1, 1, state=trainer.engine.state, batch=small_batch)
    made.end_epoch(1, 1, state=trainer.engine.state)
    lines = collected(tmp_path)
    assert len(lines.conflict) == (method == "arat")
    assert set(lines.snapshots[0]["branches"]) == ({"clean", "adv"} if method == "arat" else {"adv"})
    assert len(lines.snapshots[0]["branches"]["adv"]) == 9  # the teacher's are not among them


def test_two_analyses_are_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    def values(folder: Path) -> list[object]:
        arguments = ["--limit", "8", "--batches", "1", "--no-pictures", "--out", str(folder)]
        assert main(["analyze", str(runs["arat"]), "--what", "conflict,mixture,margin", *arguments]) == 0
        return [json.loads(f.read_text())["runs"] for f in sorted(folder.glob("*.json"))]

    assert values(tmp_path / "a") == values(tmp_path / "b")
    assert not list((tmp_path / "a").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["analyze", "nowhere"], ["nowhere is no run directory"]),
        (["analyze", "RUN", "--what", "conflicts"], ["unknown analysis 'conflicts'", "mean 'conflict'"]),
        (["analyze", "RUN", "--what", ","], ["names no analysis"]),
        (["analyze", "RUN", "--batches", "0"], ["--batches 0"]),
        (["analyze", "RUN", "--seed", "-1"], ["--seed is -1"]),
        (["analyze", "STANDARD", "--what", "conflict"], ["method standard has no invariance term"]),
        (["analyze", "RUN", "--out", "FILE/out"], ["cannot write to", "--out"]),
        (["analyze", "RUN", "--weights", "swa", "--what", "margin"], ["has no swa weights"]),
        (["analyze"], ["no run is named"]),
        (["compare"], ["no run is named"]),
        (["compare", "nowhere"], ["nowhere is no run directory"]),
        (["compare", "RUN", "--json", "--markdown"], ["give one of them"]),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message(
    arguments: list[str],
    parts: list[str],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("precious")
    known = {"RUN": str(runs["arat"]), "STANDARD": str(runs["standard"])}
    assert main([known.get(a, a) for a in arguments]) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert (tmp_path / "FILE").read_text() == "precious"


def test_without_matplotlib(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = ["--out", str(tmp_path / "out"), "--what", "margin", "--limit", "8"]
    assert main(["analyze", str(runs["arat"]), *out]) == 2
    message = capsys.readouterr().err
    assert "arat-fast[plots]" in message
    assert "--no-pictures" in message
    assert not (tmp_path / "out").exists()  # before anything was measured
    assert main(["analyze", str(runs["arat"]), *out, "--no-pictures"]) == 0
    assert (tmp_path / "out" / "margin.json").exists()


def test_compare(
    runs: dict[str, Path], digits: tuple[ImageSet, ImageSet], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["arat"]
    record = evaluate_run(run, digits[1], ["clean", "pgd2"], device=CPU, options=EvaluationOptions(limit=20))
    (run / "results.json").write_text(json.dumps({"arat": summary(record)}))
    places = [str(runs["arat"]), str(runs["naive"])]
    assert main(["compare", *places, "--json"]) == 0
    arat, naive = json.loads(capsys.readouterr().out)
    accuracy = record["figures"]["clean"]["accuracy"]
    assert arat["figures"]["clean"] == {
        "accuracy": accuracy,
        "n": 20,
        "error_95": binomial_error(accuracy, 20),
    }
    assert naive["figures"] == {}
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert arat["hours"] == pytest.approx(line["wall_seconds"] / 3600)
    assert arat["images_per_second"] == line["images_per_second"]

    # A record in the folder, of more images, takes the summary's place; one of another checkpoint does not.
    larger = evaluate_run(run, digits[1], ["pgd2"], device=CPU, options=EvaluationOptions(limit=60))
    (run / "record.json").write_text(json.dumps(larger))
    (run / "stale.json").write_text(json.dumps(record | {"checkpoint_sha256": "0" * 64}))
    (run / "other.json").write_text("{ not JSON")
    assert main(["compare", *places, "--json"]) == 0
    arat, _ = json.loads(capsys.readouterr().out)
    assert arat["figures"]["pgd2"]["n"] == 60
    assert arat["figures"]["clean"]["n"] == 20

    assert main(["compare", *places]) == 0
    first, rule, arat_row, naive_row, note = capsys.readouterr().out.splitlines()
    assert first.split() == ["run", "what", "clean", "PGD-2", "AutoAttack", "images/s", "hours"]
    assert set(rule) == {"-", " "}
    assert f"{100 * accuracy:.1f} ± {100 * binomial_error(accuracy, 20):.1f}" in arat_row
    assert naive_row.split()[-5:-2] == ["-", "-", "-"]
    assert "n = 20, 60 test images" in note
    assert "Linf 0.12" in note
    assert main(["compare", *places, "--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1] == "|---|---|---:|---:|---:|---:|---:|"
    assert len({row.count("|") for row in table[:4]}) == 1
    for name in ("results", "record", "stale", "other"):
        (run / f"{name}.json").unlink()


@pytest.fixture
def four_runs(runs: dict[str, Path], tmp_path: Path) -> list[str]:
    """Folders of ARAT with seeds 2, 0 and 1 and an ordinary run, with figures of 40 test images each."""
    places = []
    accuracies = [{"clean": 0.9, "pgd2": 0.5}, {"clean": 0.6, "pgd2": 0.25}, {"clean": 0.6}]
    for seed, figures in zip((2, 0, 1), accuracies, strict=True):
        places.append(tmp_path / f"arat-{seed}")
        places[-1].mkdir()
        config = json.loads((runs["arat"] / "config.json").read_text())
        (places[-1] / "config.json").write_text(json.dumps(config | {"seed": seed}))
        (places[-1] / "results.json").write_text(json.dumps({"arat": figures | {"n": 40}}))
        (places[-1] / "metrics.jsonl").write_bytes((runs["arat"] / "metrics.jsonl").read_bytes())
    return [*map(str, places), str(runs["standard"])]


def test_compare_over_seeds(
    four_runs: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["compare", *four_runs, "--over-seeds", "--json"]) == 0
    assert [r.message for r in caplog.records] == ["arat: only 2 of 3 runs have pgd2"]
    arat, standard = json.loads(capsys.readouterr().out)
    assert (arat["label"], arat["seeds"]) == ("arat", [0, 1, 2])
    assert arat["runs"] == [four_runs[1], four_runs[2], four_runs[0]]
    clean = arat["figures"]["clean"]
    assert clean["accuracies"] == [0.6, 0.6, 0.9]
    assert clean["n"] == [40, 40, 40]
    assert clean["mean"] == pytest.approx(0.7)
    assert clean["std"] == pytest.approx(0.03**0.5)  # (0.01 + 0.01 + 0.04) / 2
    assert arat["figures"]["pgd2"]["mean"] == pytest.approx(0.375)
    (line,) = [json.loads(text) for text in Path(four_runs[0], "metrics.jsonl").read_text().splitlines()]
    assert arat["images_per_second"] == line["images_per_second"]
    assert arat["hours"] == pytest.approx(line["wall_seconds"] / 3600)
    assert (standard["seeds"], standard["figures"]) == ([0], {})

    assert main(["compare", *four_runs, "--over-seeds"]) == 0
    header, _, arat_row, standard_row, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["what", "seeds", "clean", "PGD-2", "AutoAttack", "images/s", "hours"]
    assert "0, 1, 2  70.0 ± 17.3  37.5 ± 17.7 " in arat_row
    assert standard_row.startswith("standard; ")
    assert "± the standard deviation over seeds" in note
    assert main(["compare", *four_runs, "--over-seeds", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| what | seeds | clean |")


def test_a_seed_that_occurs_twice(
    four_runs: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["compare", four_runs[0], four_runs[0], "--over-seeds"]) == 0
    assert "seeds [2, 2] are not all different" in caplog.text
    caplog.clear()
    assert main(["compare", four_runs[0], "--over-seeds"]) == 0  # one seed: a mean without a spread
    assert caplog.text == ""
    assert capsys.readouterr().out.splitlines()[-2].split()[-6:-2] == ["2", "90.0", "50.0", "-"]


def test_own_networks_are_experiments_of_their_own(
    four_runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for place, name in zip(four_runs[:2], ("Mine", "Yours"), strict=True):
        environment = json.loads((Path(four_runs[-1]) / "environment.json").read_text())
        own = environment | {"own_network": name}
        (Path(place) / "environment.json").write_text(json.dumps(own))
    assert main(["compare", *four_runs[:2], "--over-seeds", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["label"], run["seeds"]) for run in found] == [
        ("arat, model Mine", [2]),
        ("arat, model Yours", [0]),
    ]


def test_figures_of_a_run_inside_another(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train --with-standard` leaves them: one results.json above, for both."""
    outer = tmp_path / "outer"
    outer.mkdir()
    for source, target in ((runs["arat"], outer), (runs["standard"], outer / "standard")):
        target.mkdir(exist_ok=True)
        for name in ("config.json", "metrics.jsonl", "last.pt"):
            (target / name).write_bytes((source / name).read_bytes())
    both = {"arat": {"clean": 0.5, "n": 40}, "standard": {"clean": 0.75, "n": 40}}
    (outer / "results.json").write_text(json.dumps(both))
    assert main(["compare", str(outer), str(outer / "standard"), "--json"]) == 0
    figures = [run["figures"]["clean"]["accuracy"] for run in json.loads(capsys.readouterr().out)]
    assert figures == [0.5, 0.75]


def test_names_and_groups(tiny_config: TrainConfig) -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["one/run", "two/run"]) == ["one/run", "two/run"]
    assert short_names(["same", "same"]) == ["same", "same"]

    def result(run: str, config: TrainConfig) -> dict[str, object]:
        return {"run": run, "label": description(config), "config": to_mapping(config)}

    seeds = [result(f"r/{s}", dataclasses.replace(tiny_config, seed=s)) for s in (0, 1)]
    standard = result("r/s", dataclasses.replace(tiny_config, method="standard"))
    assert {k: len(v) for k, v in groups([*seeds, standard]).items()} == {"arat": 2, "standard": 1}
    other = result("r/2", dataclasses.replace(tiny_config, epochs=9))
    of_one_name = groups([*seeds, other])
    assert {k: len(v) for k, v in of_one_name.items()} == {"arat, epochs 3": 2, "arat, epochs 9": 1}
    more = dataclasses.replace(tiny_config, epochs=9, batch_size=8, weight_decay=0.1)
    assert list(groups([*seeds, result("r/3", more)])) == ["arat, 0, 1", "arat, 3"]
    emr = dataclasses.replace(
        tiny_config, method="at", emr=dataclasses.replace(tiny_config.emr, coefficient=0.1)
    )
    assert description(emr) == "at + EMR"
