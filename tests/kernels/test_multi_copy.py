"""Tensors restored by a flag on the device: the kernel, the CPU's way and the twin copy the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arat_fast.kernels.dispatch import INTERPRETING
from arat_fast.kernels.multi_copy import CopyWhere, copy_where_reference


def some_tensors(device: torch.device, seed: int) -> list[Tensor]:
    """Dtypes, odd sizes, layouts, a scalar and an empty one; not-finite values among them."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(17, generator=generator),
        torch.randn(64, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn(5001, generator=generator).bfloat16(),
        torch.randn(70_000 if not INTERPRETING else 5_000, generator=generator),
        torch.tensor(seed + 3),
        torch.randn(3, generator=generator).double(),
        torch.randn(7, generator=generator).half(),
        torch.empty(0),
        torch.tensor([True, False, seed > 0]),
    ]
    made[0][1], made[2][7] = torch.nan, torch.inf
    return [tensor.to(device) for tensor in made]


def devices() -> list[object]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("flag", [False, True])
def test_copies_all_or_nothing(flag: bool, device: str) -> None:
    where = torch.device(device)
    targets, sources = some_tensors(where, 0), some_tensors(where, 1)
    before, twins = [t.clone() for t in targets], [t.clone() for t in targets]
    switch = torch.tensor(flag, device=where)
    copy = CopyWhere(targets, sources)
    assert (copy.table is not None) == (INTERPRETING or device == "cuda")
    copy(switch)
    copy_where_reference(twins, sources, switch)
    for target, twin, old, source in zip(targets, twins, before, sources, strict=True):
        expected = source if flag else old
        assert target.stride() == old.stride()
        for found in (target, twin):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", devices())
def test_a_tensor_that_moved_is_found(device: str) -> None:
    target, source = torch.zeros(40, device=device), torch.ones(40, device=device)
    copy = CopyWhere([target], [source])
    old = target.data
    target.data = torch.full((40,), 5.0, device=device)
    copy(torch.tensor(True, device=device))
    assert target.tolist() == [1] * 40
    assert old.tolist() == [0] * 40


@pytest.mark.gpu
def test_a_captured_graph_reads_the_flag_at_each_replay() -> None:
    device = torch.device("cuda")
    target, source = torch.zeros(1000, device=device), torch.ones(1000, device=device)
    flag = torch.tensor(False, device=device)
    copy = CopyWhere([target], [source])
    copy(flag)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy(flag)
    graph.replay()
    assert float(target.sum()) == 0
    flag.fill_(True)
    graph.replay()
    assert float(target.sum()) == 1000


def test_opcheck() -> None:
    targets, sources = some_tensors(torch.device("cpu"), 0)[:3], some_tensors(torch.device("cpu"), 1)[:3]
    torch.library.opcheck(
        torch.ops.arat_fast.copy_where_.default, (targets, sources, torch.tensor(True), None), {}
    )


@pytest.mark.parametrize(
    ("targets", "sources", "error", "says"),
    [
        ([], [], ValueError, "at least one"),
        ([torch.zeros(2)], [], ValueError, "1 targets and 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], ValueError, r"sources\[0\] has shape \(3,\)"),
        ([torch.zeros(2)], [torch.zeros(2).half()], TypeError, r"sources\[0\] is float16"),
        ([torch.zeros(4, 4)], [torch.zeros(4, 4).t()], ValueError, "one layout"),
        ([torch.zeros(4, 4)[:, :2]], [torch.zeros(4, 4)[:, :2]], ValueError, "dense"),
    ],
)
def test_what_does_not_fit_is_named(
    targets: list[Tensor], sources: list[Tensor], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        CopyWhere(targets, sources)


def test_the_flag_is_checked() -> None:
    copy = CopyWhere([torch.zeros(2)], [torch.ones(2)])
    with pytest.raises(TypeError, match="flag"):
        copy(torch.tensor(1))
    with pytest.raises(ValueError, match="flag"):
        copy(torch.tensor([True]))
