from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import InterruptedRun
from litdeploy.networks import load
from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import Progress, compress
from tests.trainer.test_compress import QUICK


class Stopped(Progress):
    """Interrupts when the second epoch begins."""

    def begin(self, phase: str, epoch: int, epochs: int, images: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_so_and_keeps_its_weights(teacher_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="after 1 of 2 epochs"):
        compress(teacher_path, out=tmp_path / "deploy", progress=Stopped(), **QUICK)
    bundle = Bundle(tmp_path / "deploy")
    manifest = bundle.read()
    assert (manifest.status, manifest.run.epochs) == ("interrupted", 1)
    assert "test" not in manifest.metrics["student"]
    assert load(bundle.student_path).class_count() == 10
