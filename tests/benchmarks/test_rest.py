"""`arat-fast bench rest`: iterations whose convolutions take no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from arat_fast.benchmarks.rest import constant_convolutions
from arat_fast.cli import main

SMALL = ["--device", "cpu", "--model", "resnet8", "--batch", "4", "--side", "8", "--threads", "1"]


@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_types_and_layouts_are_a_convolutions(compiled: bool) -> None:
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    x = torch.rand(2, 3, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, layer.weight)

    def run(forward: Callable[[torch.Tensor], torch.Tensor] = layer) -> list[torch.Tensor]:
        y = forward(x)
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    expected = run()
    with constant_convolutions():
        found = run(torch.compile(layer, fullgraph=True)) if compiled else run()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert not torch.equal(one, other)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rest.json"
    assert main(["bench", "rest", *SMALL, "--repeats", "2", "--compile", "off", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "without convolutions" in printed
    record = json.loads(file.read_text())
    assert list(record["variants"]) == ["eager", "fast", "strong"]
    assert record["variants"]["eager"]["ratio"] == 1
    for of in record["variants"].values():
        assert of["spread"][0] <= of["milliseconds"] <= of["spread"][1]
    assert record["conditions"]["attack_steps"] == 2


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
    assert main(["bench", "rest", *SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "rest.json"
    arguments = ["--model", "resnet8", "--batch", "32", "--repeats", "2", "--json", str(file)]
    assert main(["bench", "rest", "--device", "cuda", *arguments]) == 0
    assert "fast-no-capture" in json.loads(file.read_text())["variants"]
