from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from litdeploy.profiler.machine.roofline import Rates, Work, count_work, measure_rates, roof


def test_operations_and_bytes_by_hand() -> None:
    layer = nn.Linear(64, 32, bias=False)
    images = torch.randn(8, 64)
    with torch.no_grad():
        work = count_work(lambda: layer(images))
    assert work.operations == 2 * 8 * 64 * 32
    assert work.bytes == 4 * (8 * 64 + 64 * 32 + 8 * 32)


def test_the_roof_is_the_longer_of_the_two() -> None:
    found = roof(Work(operations=2e9, bytes=1e9), Rates(operations=1e9, bytes=2e9))
    assert asdict(found) == {"seconds": 2.0, "by_operations": 2.0, "by_bytes": 0.5}


def test_the_device_is_measured_once() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.operations > 1e8
    assert rates.bytes > 1e8
    assert measure_rates(torch.device("cpu"), torch.float32) is rates
