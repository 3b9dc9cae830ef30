"""What the speed is bound by, and what disturbed the measurement: in words, with the figures behind them."""

from __future__ import annotations

from typing import Literal

from litdeploy.bundle import Record

Kind = Literal[
    "launch-bound",
    "copy-bound",
    "memory-bound",
    "arithmetic-bound",
    "overhead-bound",
    "throttled",
    "noisy neighbour",
    "drift",
    "behind pace",
    "ideal ratio",
]


class Finding(Record):
    """One sentence of the diagnosis.

    Attributes:
        kind: what it is about.
        sentence: for people, with its figures.
        figures: those of the sentence and what they were computed from, by name; the unit is the name's last word.
        runner, batch_size: what it was found of; None where it is of all.
    """

    kind: Kind
    sentence: str
    figures: dict[str, float]
    runner: str | None = None
    batch_size: int | None = None
