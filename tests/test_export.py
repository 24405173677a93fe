"""`arat-fast export`: the run's logits, in a process without arat_fast; leaderboards; wrong requests."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arat_fast import reference
from arat_fast.cli import main
from arat_fast.config import load_recipe
from arat_fast.errors import TrainingError, UserError
from arat_fast.evaluation.network import load_run
from arat_fast.evaluation.record import sha256_of
from arat_fast.export import from_file, from_run, model_info, standalone, write_export
from arat_fast.loaders.images import ImageSet
from arat_fast.models.plain import model_names, plain_network
from arat_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(digits: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of ARAT: both branches have moved, apart."""
    config = load_recipe("digits")
    attack = dataclasses.replace(config.attack, steps=1)
    config = dataclasses.replace(
        config, epochs=1, drops=(), batch_size=32, limit_train=96, device="cpu", attack=attack
    )
    folder = tmp_path_factory.mktemp("export") / "run"
    Trainer(config, digits[0], folder).run()
    return folder


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def logits_of(run: Path, branch: str) -> Tensor:
    network = load_run(run, CPU).network
    reference.use_branch(network, branch)
    with torch.no_grad():
        return network(images())


def logits_elsewhere(folder: Path, code: str, model: str) -> Tensor:
    """What `model` gives in a process that sees torch and the folder alone, after it ran `code`."""
    torch.save(images(), folder / "images.pt")
    lines = [
        "import sys; sys.modules['arat_fast'] = sys.modules['safetensors'] = None",
        code,
        "torch.set_num_threads(1); images = torch.load('images.pt')",
        f"torch.save([m(images).detach() for m in ({model})], 'logits.pt')",
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "logits.pt")


def test_another_process_without_arat_fast_gets_the_runs_logits(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "load_model(" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "model.pt2", "model.py", "model.safetensors", "robustbench.json",
    ]  # fmt: skip
    expected = logits_of(run, "adv")
    assert (expected - logits_of(run, "clean")).abs().max() > 1e-3
    # The README's snippet as it stands, then the program: of any batch size, here five, two when traced.
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.strip() in printed
    both = "model, torch.export.load('model.pt2').module()"
    plain, program = logits_elsewhere(tmp_path, code, both)
    assert torch.equal(plain, expected)
    torch.testing.assert_close(program, expected, rtol=1e-6, atol=1e-6)


def test_the_clean_branch(run: Path, tmp_path: Path) -> None:
    network = from_run(run, branch="clean")
    with torch.no_grad():
        assert torch.equal(network.model(images()), logits_of(run, "clean"))
    write_export(network, tmp_path, ["safetensors"])
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "model.py", "model.safetensors"}


def test_the_file_is_what_the_safetensors_package_reads(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    write_export(from_run(run), tmp_path, ["safetensors"])
    file = tmp_path / "model.safetensors"
    ours, metadata = standalone.read_safetensors(file)
    theirs = load_file(file)
    assert ours.keys() == theirs.keys() == reference.resnet8(10, 1, False).state_dict().keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata
    assert metadata["checkpoint_sha256"] == sha256_of(run / "last.pt")
    assert (metadata["branch"], metadata["weights"]) == ("adv", "last")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        standalone.load_model(file)


def test_plain_networks_are_the_references(run: Path) -> None:
    """Names and logits, for every model; shapes alone where a forward would take seconds."""
    assert {*standalone.MODELS, *standalone.PHOTO_MODELS} == set(model_names())
    for name in model_names():
        with torch.device("meta"):
            theirs, ours = plain_network(name, 7, 1, split_bn=False), standalone.build(name, 7, 1)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
    torch.manual_seed(0)
    wide, plain = (
        standalone.WideResNet(10, 1, 7, 3),
        reference.WideResNet(10, 1, num_classes=7, split_bn=False),
    )
    plain.load_state_dict(wide.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(wide.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["resnet18-imagenet", "timm/resnet10t"])
def test_networks_of_libraries(name: str, tmp_path: Path) -> None:
    """Their own definitions, found by name in the file's metadata; both branches from the authors' layout."""
    if name.startswith("timm"):
        from arat_fast.loaders import torchvision_import  # noqa: F401  (timm imports torchvision)

        pytest.importorskip("timm")
    torch.manual_seed(0)
    split = plain_network(name, 5, 1, split_bn=True).eval()
    with torch.no_grad():
        for key, value in split.state_dict().items():
            if ".adv." in key and "tracked" not in key:
                value.copy_(torch.rand(value.shape) + 0.5)
    torch.save(split.state_dict(), tmp_path / "split.pt")
    exported = from_file(tmp_path / "split.pt", name, 5, 1, 32)
    write_export(exported, tmp_path / "out", ["safetensors"])
    x = torch.rand(2, 1, 32, 32)
    reference.use_branch(split, "adv")
    with torch.no_grad():
        assert torch.equal(standalone.load_model(tmp_path / "out" / "model.safetensors")(x), split(x))
    library = "timm" if name.startswith("timm") else "torchvision"
    assert f"it needs torch and {library}" in (tmp_path / "out" / "README.md").read_text()
    architecture = {"resnet18-imagenet": "ResNet-18"}.get(name, "resnet10t")
    assert model_info(exported)["architecture"] == architecture


def test_what_does_not_give_the_logits_is_refused(run: Path, tmp_path: Path) -> None:
    network = from_run(run)
    with torch.no_grad():
        network.model.get_parameter("linear.bias").add_(1e-3)
    with pytest.raises(TrainingError, match=r"model\.safetensors gives other logits than the original"):
        write_export(network, tmp_path, ["safetensors"])


def record(run: Path, **changes: object) -> dict[str, object]:
    figures = {
        "clean": {"accuracy": 0.8782, "n": 355},
        "clean_branch": {"accuracy": 0.95, "n": 355},
        "autoattack": {"accuracy": 0.4902, "n": 200, "eps": "0.12", "norm": "Linf"},
        "autoattack10": {"accuracy": 0.51, "n": 355, "eps": "0.12", "norm": "Linf"},
    }
    measured = {"checkpoint_sha256": sha256_of(run / "last.pt"), "weights": "last", "figures": figures}
    return measured | changes


def test_robustbench_fields(run: Path) -> None:
    fields = [
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote",
    ]  # fmt: skip
    file = run / "record.json"
    try:
        empty = model_info(from_run(run))
        assert list(empty) == fields
        assert (empty["clean_acc"], empty["autoattack_acc"], empty["footnote"]) == (None, None, None)
        assert (empty["architecture"], empty["eps"], empty["dataset"]) == ("ResNet-8", "0.12", "digits")
        file.write_text(json.dumps(record(run)))
        info = model_info(from_run(run))
        assert (info["clean_acc"], info["autoattack_acc"], info["reported"]) == ("87.82", "49.02", "49.02")
        assert (
            info["footnote"] == "Measured: clean accuracy on 355 test images, AutoAttack on 200 test images."
        )
        clean = model_info(from_run(run, branch="clean"))
        assert (clean["clean_acc"], clean["autoattack_acc"]) == ("95.00", None)
        # Figures of other weights, or of another radius, are not this network's.
        for other in ({"checkpoint_sha256": "0" * 64}, {"weights": "swa"}):
            file.write_text(json.dumps(record(run, **other)))
            assert model_info(from_run(run))["clean_acc"] is None
        small = record(run)
        small["figures"]["autoattack"]["eps"] = "0.01"  # type: ignore[index]
        file.write_text(json.dumps(small))
        assert model_info(from_run(run))["autoattack_acc"] is None
        # What `arat-fast train` wrote at its end.
        file.unlink()
        (run / "results.json").write_text(json.dumps({"arat": {"clean": 0.5, "pgd2": 0.25, "n": 40}}))
        assert model_info(from_run(run))["clean_acc"] == "50.00"
    finally:
        file.unlink(missing_ok=True)
        (run / "results.json").unlink(missing_ok=True)


def test_a_checkpoint_file_with_its_network_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--model", "resnet8", "--in-channels", "1", "--image-size", "8"]
    assert main(["export", str(run / "last.pt"), *flags, "--out", str(out)]) == 0
    with torch.no_grad():
        assert torch.equal(standalone.load_model(out / "model.safetensors")(images()), logits_of(run, "adv"))
    assert json.loads((out / "robustbench.json").read_text())["additional_data"] is None
    # An export is a checkpoint file too.
    again = from_file(out / "model.safetensors", "resnet8", 10, 1, 8)
    with torch.no_grad():
        assert torch.equal(again.model(images()), logits_of(run, "adv"))


def test_a_run_with_single_batch_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = reference.resnet8(10, 1, split_bn=False)
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    exported = from_file(tmp_path / "plain.pt", "resnet8", 10, 1, 8)
    with torch.no_grad():
        assert torch.equal(exported.model(images()), network.eval()(images()))
    with pytest.raises(UserError, match="the network has single BatchNorms"):
        from_file(tmp_path / "plain.pt", "resnet8", 10, 1, 8, branch="clean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--format", "safetensor"], "unknown format 'safetensor': did you mean 'safetensors'"),
        (["{run}", "--format", ","], "--format is empty"),
        (["{run}", "--model", "resnet8"], "--model is for checkpoint files"),
        (["{run}", "--weights", "swa"], "has no swa weights"),
        (["{run}/absent"], "is no run directory"),
        (["{run}/last.pt"], "is a file: name its network with --model"),
        (["{run}/last.pt", "--model", "resnet80"], "unknown model 'resnet80': did you mean 'resnet8'"),
        (["{run}/last.pt", "--model", "resnet8", "--num-classes", "0"], "--num-classes is 0"),
        (
            ["{run}/last.pt", "--model", "resnet8", "--in-channels", "1", "--num-classes", "100"],
            "is for 10 classes (linear.weight is (10, 64)); the model has 100",
        ),
        (["{run}/last.pt", "--model", "resnet8"], "conv1.weight is (16, 1, 3, 3), expected (16, 3, 3, 3)"),
        (["{run}/config.json", "--model", "resnet8"], "is not a readable checkpoint"),
        (["{run}", "--out", "{run}/config.json"], "cannot write to"),
    ],
)
def test_wrong_requests(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *(a.format(run=run) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_without_safetensors(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["export", str(run), "--out", str(tmp_path)]) == 2
    assert "pip install 'arat-fast[export]'" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path), "--format", "robustbench"]) == 0
