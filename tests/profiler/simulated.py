"""A simulated machine: its clock advances by the time that the programs on it take, and by nothing else."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from litdeploy.profiler.measure.timing import Stopwatch
from litdeploy.runtime import Description


class Machine:
    """A clock, and how much slower the machine is than at its best.

    Args:
        seed: of all its random numbers.
        noise: relative, independent for each call.
        wander: relative, of the machine's speed; it changes over some hundred calls and affects all programs alike.
        drift: relative, by how much it slows down in a virtual minute.
        spikes: share of calls that are interrupted and take three times as long.
    """

    def __init__(
        self, seed: int, *, noise: float = 0.02, wander: float = 0.0, drift: float = 0.0, spikes: float = 0.0
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._noise, self._wander, self._drift, self._spikes = noise, wander, drift, spikes
        self._state = 0.0
        self._ns = 0

    def work(self, seconds: float) -> None:
        """Advance the clock by the time that this work takes now."""
        draw = self._random
        self._state = 0.99 * self._state + math.sqrt(1 - 0.99**2) * draw.standard_normal()
        slower = math.exp(self._wander * self._state + self._drift * self._ns / 60e9)
        taken = seconds * slower * (1 + self._noise * draw.exponential())
        if draw.random() < self._spikes:
            taken *= 3
        self._ns += round(taken * 1e9)

    def sleep(self, seconds: float) -> None:
        """Advance the clock."""
        self._ns += round(seconds * 1e9)

    @property
    def stopwatch(self) -> Stopwatch:
        """On the machine's clock. Processor time equals wall time: nothing else uses the core."""
        return Stopwatch(lambda: self._ns, self.sleep, lambda: self._ns)


class Simulated:
    """A runner whose calls take a number of seconds of the machine's work."""

    name = "simulated"
    device = torch.device("cpu")

    def __init__(self, machine: Machine, seconds: float) -> None:
        self._machine, self._seconds = machine, seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, batch_NCHW: Tensor) -> Tensor:
        self._machine.work(self._seconds)
        return batch_NCHW

    def describe(self) -> Description:
        return Description(self.name, "cpu", "fp32", "simulated", {}, 0.0)
