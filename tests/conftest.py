"""Fixtures that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.checkpoint import write_checkpoint
from litdeploy.networks import new

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and teachers, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real data and teachers are not at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded by a test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ResNet-14 of width 4 for scikit-learn's digits."""
    made = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=tuple("0123456789")))
    return path
