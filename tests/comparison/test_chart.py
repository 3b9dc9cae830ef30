from __future__ import annotations

import re

import pytest

from litdeploy.comparison.chart import accuracy_over_depth
from litdeploy.comparison.result import MethodComparison, rows_of
from tests.comparison.test_result import outcome


@pytest.fixture
def result() -> MethodComparison:
    outcomes = [
        outcome(method, depth, seed, top1 + 0.01 * seed)
        for method, top1 in (("kd", 0.7), ("lit", 0.8))
        for depth in (8, 20)
        for seed in range(2)
    ]
    return MethodComparison.model_construct(
        rows=rows_of(outcomes), outcomes=tuple(outcomes), teacher_accuracy=outcome("", 0, 0, 0.9).test
    )


def test_each_method_has_a_line_and_each_training_a_circle(result: MethodComparison) -> None:
    drawing = accuracy_over_depth(result)
    assert drawing is not None
    for label in ("kd", "lit", "teacher", "depth"):
        assert f">{label}<" in drawing.inline
    # Circles are drawn once each: two methods, two depths, two seeds.
    assert len(re.findall(r"<use[^>]*PathCollection|id=\"[^\"]*PathCollection_\d+\"", drawing.inline)) == 2
    assert "80.50" in drawing.inline  # what a screen reader is told


def test_the_page_lends_its_colours_and_a_file_has_its_own(result: MethodComparison) -> None:
    drawing = accuracy_over_depth(result)
    assert drawing is not None
    assert "var(--second)" in drawing.inline
    assert "var(--series-1)" in drawing.inline
    assert "var(" not in drawing.alone
    assert not re.search(r"#0[ac]0[bd]0", drawing.inline + drawing.alone)


def test_nothing_is_drawn_of_nothing() -> None:
    empty = MethodComparison.model_construct(rows=(), outcomes=(), teacher_accuracy=None)
    assert accuracy_over_depth(empty) is None
