from __future__ import annotations

import re

import pytest

from litdeploy.comparison.report import MethodComparison, Outcome, accuracy_over_depth, as_csv, headline, rows_of
from litdeploy.storage.records import Accuracy


def outcome(method: str, depth: int, seed: int, top1: float) -> Outcome:
    accuracy = Accuracy(top1=top1, loss=1.0, images=100)
    return Outcome(
        method=method,
        depth=depth,
        seed=seed,
        validation=accuracy,
        test=accuracy,
        seconds=2.0 + seed,
        epochs=1,
        images=10,
        device="a processor",
        student_sha256="0",
    )


def test_rows_have_students_interval() -> None:
    (row,) = rows_of([outcome("lit", 20, seed, top1) for seed, top1 in enumerate((0.80, 0.82, 0.84))])
    # t with 2 degrees of freedom is 4.3027; the standard error is 0.02 / √3.
    assert row.mean == pytest.approx(0.82)
    assert row.high == pytest.approx(0.82 + 4.302653 * 0.02 / 3**0.5, abs=1e-6)
    assert row.seeds == (0, 1, 2)
    assert row.seconds == 3.0


def test_an_interval_stays_within_what_an_accuracy_can_be() -> None:
    (row,) = rows_of([outcome("lit", 20, 0, 0.2), outcome("lit", 20, 1, 0.9)])
    assert (row.low, row.high) == (0.0, 1.0)


def test_rows_come_by_depth_and_best_first() -> None:
    rows = rows_of([outcome("kd", 20, 0, 0.8), outcome("lit", 20, 0, 0.9), outcome("kd", 8, 0, 0.7)])
    assert [(row.depth, row.method) for row in rows] == [(8, "kd"), (20, "lit"), (20, "kd")]


def test_the_headline_says_no_more_than_the_seeds_bear_out() -> None:
    close = rows_of([outcome(method, 20, seed, 0.8 + 0.01 * seed) for method in ("kd", "lit") for seed in range(2)])
    assert headline(close).endswith("(intervals overlap)")
    apart = rows_of(
        [outcome(m, 20, seed, top1 + 1e-4 * seed) for m, top1 in (("kd", 0.7), ("lit", 0.8)) for seed in range(3)]
    )
    assert headline(apart) == "Depth 20: lit 80.01\N{NO-BREAK SPACE}%, next kd 70.01\N{NO-BREAK SPACE}%"
    single = rows_of([outcome("kd", 20, 0, 0.7), outcome("lit", 20, 0, 0.9)])
    assert headline(single).endswith("(one seed)")


def test_csv_has_a_line_a_training() -> None:
    head, first = as_csv([outcome("lit", 20, 1, 0.5)]).splitlines()
    assert dict(zip(head.split(","), first.split(","), strict=True)) == {
        "method": "lit",
        "depth": "20",
        "seed": "1",
        "test_top1": "0.5",
        "test_images": "100",
        "validation_top1": "0.5",
        "seconds": "3.0",
        "epochs": "1",
        "images": "10",
        "device": "a processor",
    }


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
