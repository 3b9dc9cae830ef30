from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from litdeploy.errors import BundleError
from litdeploy.networks import load
from litdeploy.trainer import train

QUICK: dict[str, Any] = {"recipe": "digits-resnet-teacher", "epochs": 1}


def test_a_new_network_is_trained_for_the_datasets_images(tmp_path: Path) -> None:
    trained = train("resnet8,width=4", out=tmp_path / "t.safetensors", **QUICK)
    assert trained.test.images > 300
    found = load(trained.path)
    assert found.spec.arguments == {"classes": 10, "in_channels": 1, "depth": 8, "width": 4}
    assert found.spec.classes == tuple("0123456789")
    assert found.spec.input.shape == (1, 8, 8)
    assert (tmp_path / "t.metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(BundleError, match="exists already"):
        train("resnet8,width=4", out=tmp_path / "t.safetensors", **QUICK)


def test_weights_are_written_as_safetensors_only(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="safetensors"):
        train("resnet8", out=tmp_path / "t.pt", **QUICK)
