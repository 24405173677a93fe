"""`arat-fast bench convolutions`: every convolution counted once, the sums what their parts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arat_fast.benchmarks.convolutions import PASSES, Convolution, calls_of, convolutions_of, random_tensors
from arat_fast.cli import main
from arat_fast.config import TrainConfig
from arat_fast.training.cost import iteration_cost

CPU = torch.device("cpu")


@pytest.mark.parametrize(("model", "held", "features"), [("resnet18", 20, 512), ("wrn-34-10", 34, 640)])
def test_the_networks_arithmetic_is_its_convolutions_and_its_classifier(
    model: str, held: int, features: int
) -> None:
    first, counts = convolutions_of(model, 32)
    assert sum(counts.values()) == held
    assert first.inputs == 3
    assert counts[first] == 1
    whole = iteration_cost(TrainConfig(model=model), (32, 32, 3), 10).forward_flop
    assert sum(n * shape.flop for shape, n in counts.items()) == whole - 2 * features * 10


@pytest.mark.parametrize("shape", [Convolution(3, 8, 3, 1, 1, 7), Convolution(5, 4, 1, 2, 0, 9)])
def test_each_pass_is_what_autograd_computes(shape: Convolution) -> None:
    x, w, dy = random_tensors(shape, 2, CPU, torch.float32)
    calls = calls_of(shape, x, w, dy)
    assert tuple(calls) == PASSES
    y = torch.nn.functional.conv2d(x.requires_grad_(), w.requires_grad_(), None, shape.stride, shape.padding)
    expected = (y, *torch.autograd.grad(y, (x, w), dy))
    for call, wanted in zip(calls.values(), expected, strict=True):
        torch.testing.assert_close(call(), wanted)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    assert shape.flop == 2 * w.numel() * y[0, 0].numel()


SMALL = ["--device", "cpu", "--model", "resnet8", "--batch", "2", "--side", "8", "--threads", "1"]


def test_the_record_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "convolutions.json"
    arguments = ["bench", "convolutions", *SMALL, "--steps", "3", "--repeats", "1", "--json", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("3 to 16, 3x3, side 8", "trial", "PGD-3 ARAT cannot pass"):
        assert words in printed
    record = json.loads(file.read_text())
    rows, whole = record["convolutions"], record["iteration"]

    def milliseconds(batch: int) -> float:
        return sum(row["count"] * row["milliseconds"] for row in rows if row["batch"] == batch)

    assert whole["attack_step_milliseconds"] == pytest.approx(milliseconds(2))
    assert whole["training_milliseconds"] == pytest.approx(milliseconds(4))
    total = 3 * milliseconds(2) + milliseconds(4)
    assert whole["images_per_second"] == pytest.approx(2 / total * 1e3)
    first, counts = convolutions_of("resnet8", 8)
    each = sum(n * shape.flop for shape, n in counts.items())
    # 3 attack steps of two passes; three passes of both kinds of images, but no gradient of the images.
    assert whole["flop_an_image"] == pytest.approx(each * (3 * 2 + 2 * 3) - 2 * first.flop)
    assert record["conditions"]["attack_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "resnet19"], "resnet18"),
        (["--batch", "-1"], "--batch"),
        (["--steps", "0"], "--steps"),
        (["--json", "."], "folder"),
    ],
)
def test_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "convolutions", *SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the command sets it; put back after
    file = tmp_path / "convolutions.json"
    arguments = ["--model", "resnet8", "--batch", "32", "--repeats", "2", "--json", str(file)]
    assert main(["bench", "convolutions", "--device", "cuda", *arguments]) == 0
    rows = json.loads(file.read_text())["convolutions"]
    assert all(0 < row["share"] < 1.1 for row in rows)
