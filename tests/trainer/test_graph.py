from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from litdeploy.trainer.graph import Captured

pytestmark = pytest.mark.gpu


class Sum:
    """Adds what it is given to a state on the device, and counts how often Python itself ran it."""

    def __init__(self, synchronises: bool = False) -> None:
        self.state = torch.zeros(4, device="cuda")
        self.calls = 0
        self._synchronises = synchronises

    def __call__(self, table: Tensor, rows: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.state += table.index_select(0, rows).sum(0)
        if self._synchronises and self.state.sum().item() < 0:
            raise AssertionError
        return {"state": self.state * 2}


def expected(table: Tensor, batches: list[Tensor]) -> list[Tensor]:
    return list(2 * torch.stack([table[rows].sum(0) for rows in batches]).cumsum(0))


def test_replayed_it_does_what_it_did() -> None:
    table = torch.arange(40.0, device="cuda").view(10, 4)
    batches = [torch.tensor([i, (3 * i) % 10], device="cuda") for i in range(8)]
    function = Sum()
    captured = Captured(function)
    found = [captured(table, rows)["state"].clone() for rows in batches]
    for a, b in zip(found, expected(table, batches), strict=True):
        torch.testing.assert_close(a, b)
    assert function.calls == 4  # three eager ones, and the one that was recorded


def test_what_cannot_be_captured_runs_as_it_is_and_says_so() -> None:
    table = torch.arange(40.0, device="cuda").view(10, 4)
    batches = [torch.tensor([i, i], device="cuda") for i in range(6)]
    captured = Captured(Sum(synchronises=True))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [captured(table, rows)["state"].clone() for rows in batches]
    assert "could not be captured as a CUDA graph" in str(told[0].message)
    for a, b in zip(found, expected(table, batches), strict=True):
        torch.testing.assert_close(a, b)
