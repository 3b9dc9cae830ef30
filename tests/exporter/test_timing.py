from __future__ import annotations

from pathlib import Path

import torch

from litdeploy.exporter.formats.onnx import interleaved_ms
from litdeploy.networks import Network
from litdeploy.runtime import open_runner


def test_both_are_called_in_turn_and_as_often(student: Network, tmp_path: Path) -> None:
    calls: list[str] = []
    with open_runner("eager", network=student, device=torch.device("cpu")) as runner:

        class Noted:
            name, device = runner.name, runner.device
            describe, __enter__, __exit__ = runner.describe, runner.__enter__, runner.__exit__

            def __init__(self, name: str) -> None:
                self.called = name

            def run(self, batch_NCHW: torch.Tensor) -> torch.Tensor:
                calls.append(self.called)
                return runner.run(batch_NCHW)

        times = interleaved_ms(Noted("a"), Noted("b"), student.example(1))
    assert min(times) > 0
    timed = calls[10:]
    assert timed == ["a", "b"] * (len(timed) // 2)
