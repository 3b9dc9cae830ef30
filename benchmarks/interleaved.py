"""Candidates timed turn by turn in one run, so that whatever disturbs the machine disturbs them all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, by bootstrap over the rounds."""

    value: float
    low: float
    high: float


def seconds(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, limit: float, seed: int = 0
) -> dict[str, list[float]]:
    """Times each candidate once a round, in an order drawn anew each round.

    Args:
        candidates: called once before, untimed.
        rounds: how many, at the most.
        limit: seconds after which no further round begins; three are always run.

    Returns:
        candidate → seconds, one a round.
    """
    for function in candidates.values():
        _timed(function, device)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    order, drawing, started = list(candidates), random.Random(seed), time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > limit:
            break
        drawing.shuffle(order)
        for name in order:
            found[name].append(_timed(candidates[name], device))
    return found


def median(samples: Sequence[float]) -> Interval:
    """The median of one candidate's figures."""
    values = np.asarray(samples)
    return _interval(np.median(values[_resampled(len(values))], axis=1), float(np.median(values)))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Interval:
    """How many times as fast one candidate is as another: the ratio of medians; rounds are resampled whole."""
    above, below = np.asarray(slower), np.asarray(faster)
    rounds = _resampled(len(above))
    drawn = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    return _interval(drawn, float(np.median(above) / np.median(below)))


def _interval(drawn: np.ndarray, value: float) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _resampled(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(2000, count))


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
