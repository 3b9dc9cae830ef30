"""A run small enough to be done many times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from litdeploy.data import pack
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.trainer import Progress, compress

QUICK: dict[str, Any] = {
    "student_depth": 8,
    "precision": "fp32",
    "device": "cpu",
    "batch_size": 16,
    "feature_cache": "off",
    "main": {"epochs": 2, "learning_rate": 0.05},
    "finetune": {"epochs": 2, "learning_rate": 0.01},
    "checkpoint_every": "off",
}
STEPS = 5  # an epoch

Compress = Callable[..., Bundle]


class Watching(Progress):
    """Keeps what it is told, and calls `at` after every step with the steps of the run so far."""

    def __init__(self, at: Callable[[int], None] | None = None) -> None:
        self.notes: list[str] = []
        self.images = 0
        self._at = at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        self.images += done

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self.images += samples
        if self._at is not None:
            self._at(self.images // QUICK["batch_size"])


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred digits, packed."""
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    pack("digits", path, train_images=120, limit=120)
    return path


@pytest.fixture(scope="session")
def tiny(teacher_path: Path, data_path: Path) -> Compress:
    """Compresses to the folder that it is given, in four epochs of five steps."""

    def call(out: Path, **changes: Any) -> Bundle:
        return compress(teacher_path, out=out, **{**QUICK, "data": {"source": str(data_path)}, **changes})

    return call


def result(bundle: Bundle) -> tuple[dict[str, Tensor], list[dict[str, Any]], Any]:
    """What must not depend on how often a run was stopped: weights, rows of the metrics without times, accuracies."""
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    timed = {"seconds", "images_per_second"}
    rows = [{key: value for key, value in row.items() if key not in timed} for row in rows]
    return read_checkpoint(bundle.student_path).weights, rows, bundle.read_complete().model_dump()["metrics"]


def assert_same(found: Bundle, expected: Bundle) -> None:
    """Bit for bit, and with nothing left of the interruptions."""
    (weights, rows, metrics), (others, other_rows, other_metrics) = result(found), result(expected)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not weights[name].equal(others[name])] == []
    assert rows == other_rows
    assert metrics == other_metrics
    assert not found.checkpoints_path.exists()
    assert not [path for path in found.path.rglob("*") if ".partial" in path.name]
