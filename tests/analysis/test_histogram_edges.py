"""The bins of the margins' histogram."""

from __future__ import annotations

import pytest

from arat_fast.analysis.pictures import _edges


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (0.3, 0.9), (-0.7, -0.2), (0.25, 0.25), (0.0, 0.0), (-3.0, -3.0)]
)
def test_cover_the_values_and_meet_at_zero(low: float, high: float) -> None:
    edges = _edges(low, high, 30)
    assert edges[0] <= low
    assert high < edges[-1]
    assert len(edges) <= 34
    width = edges[1] - edges[0]
    assert all(abs(edge / width - round(edge / width)) < 1e-9 for edge in edges)  # 0 is one of them
