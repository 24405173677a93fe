"""Evaluation computes in full float32, and leaves PyTorch's settings as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from arat_fast.evaluation.accuracy import clean_correct, pgd_correct
from arat_fast.evaluation.autoattack import autoattack_correct
from arat_fast.evaluation.float32 import full_float32
from arat_fast.loaders.images import ImageSet

CPU = torch.device("cpu")


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = settings()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = (
        before
    )


class Noting(nn.Module):
    """A linear classifier of digits that notes the settings under which it runs."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.linear, self.fails = nn.Linear(64, 10), fails
        self.seen: set[tuple[bool, bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(settings())
        logits: Tensor = self.linear(x.flatten(1))
        return logits * torch.nan if self.fails else logits


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("searches", [False, True])
def test_accuracies_are_of_full_float32(
    digits: tuple[ImageSet, ImageSet], tf32: bool, searches: bool
) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = tf32, tf32, searches
    data, network = digits[1].first(20), Noting()
    clean_correct(network, data, device=CPU)
    pgd_correct(network, data, eps=0.1, alpha=0.05, steps=2, device=CPU)
    assert network.seen == {(False, False, True)}
    assert settings() == (tf32, tf32, searches)
    with pytest.raises(Exception, match="not finite"):
        clean_correct(Noting(fails=True), data, device=CPU)
    assert settings() == (tf32, tf32, searches)


def test_autoattack_searches_no_algorithms(digits: tuple[ImageSet, ImageSet]) -> None:
    """Its batches shrink as images fall: every size would be searched for."""
    pytest.importorskip("pyautoattack")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    network = Noting()
    autoattack_correct(
        network, digits[1].first(8), eps=0.1, attacks=("apgd-ce",), iterations=2, queries=2, device=CPU
    )
    assert network.seen == {(False, False, False)}
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32


SETS = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
]
PROBE = """
import sys, torch
from arat_fast.evaluation.float32 import full_float32
def state():
    cudnn = torch.backends.cudnn
    reads = [lambda: cudnn.conv.fp32_precision, lambda: cudnn.rnn.fp32_precision, lambda: cudnn.allow_tf32,
             torch.get_float32_matmul_precision, lambda: cudnn.benchmark]
    found = []
    for read in reads:
        try:
            found.append(read())
        except RuntimeError:
            found.append("cannot be read")
    return found
exec(sys.argv[1])
before = state()
for _ in range(2):
    with full_float32(benchmark=True):
        assert torch.backends.cudnn.conv.fp32_precision != "tf32", state()
        assert torch.backends.cuda.matmul.fp32_precision != "tf32", state()
    assert state() == before, (before, state())
"""


@pytest.mark.parametrize("line", SETS)
def test_whatever_a_program_has_set_comes_back(line: str) -> None:
    """In a process of its own: not every setting can be taken back."""
    result = subprocess.run([sys.executable, "-c", PROBE, line], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_program_that_set_the_newer_flag_gets_it_back(precision: str) -> None:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    conv.fp32_precision = precision
    with full_float32(benchmark=True):
        assert conv.fp32_precision != "tf32"
    assert (conv.fp32_precision == "tf32") == (precision == "tf32")
