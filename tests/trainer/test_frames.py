"""A reader reaches `backward` in few steps from the command."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import litdeploy
from litdeploy.cli import main

PACKAGE = Path(litdeploy.__file__).parent
MOST = 6


def test_few_frames_lead_from_the_command_to_backward(
    teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []
    real = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        own = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        stacks.append([f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.function}" for frame in reversed(own)])
        real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    # All phases of LIT: sections, all together, fine-tuning.
    words = ["compress", str(teacher_path), "--recipe", "digits-resnet", "--student-depth", "8", "--epochs", "5"]
    words += ["--device", "cpu", "--batch-size", "512", "--compile", "off", "--out", str(tmp_path / "deploy")]
    monkeypatch.setattr("sys.argv", ["litdeploy", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert stacks
    for stack in stacks:
        command = next(place for place, name in enumerate(stack) if name == "cli/compress.py:command")
        assert len(stack) - command <= MOST, stack
