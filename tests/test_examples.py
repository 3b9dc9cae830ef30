from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from litdeploy.exporter.formats.inductor import export_aoti
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.networks import Network, new

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_an_exported_file_runs_without_litdeploy(tmp_path: Path, suffix: str) -> None:
    made = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    network = Network(made.module.eval(), made.spec, made.source)
    path = tmp_path / f"student{suffix}"
    if suffix == ".onnx":
        export_onnx(network, path, None)
    else:
        export_aoti(network, path, torch.device("cpu"))
    batch = network.example(5)
    np.save(tmp_path / "images.npy", batch.numpy())
    # Away from the checkout, and with a litdeploy that cannot be imported.
    script = shutil.copy(EXAMPLES / "run_exported.py", tmp_path)
    (tmp_path / "litdeploy.py").write_text("raise ImportError\n")
    words = [sys.executable, "-W", "ignore", script, path, tmp_path / "images.npy"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = network.module(batch).argmax(1).tolist()
    assert [int(word) for word in done.stdout.split()] == expected
