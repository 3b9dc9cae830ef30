"""Data without labels, the whole way on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litdeploy.networks import new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from tests.cli.conftest import Run

TARGET = """
device: cpu
runners: [eager, onnxruntime]
batch_sizes: [1]
timing: {warmup_ms: 1, samples: 8, max_seconds: 1}
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of color images of several sizes, one of which is torn, and a teacher for them."""
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(80):
        pixels = random.integers(0, 256, (12 + number % 3, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:03}.png")
    (tmp_path / "photos" / "torn.png").write_bytes(b"torn")
    made = new("resnet14,width=4", normalise="half", input_shape=(3, 16, 16), classes=5, seed=3)
    write_checkpoint(tmp_path / "teacher.safetensors", made.module.state_dict(), made.spec)
    return tmp_path / "photos"


def test_a_folder_of_photos(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(TARGET)
    line = ("compress", "teacher.safetensors", "--data", "photos", "--student-depth", "8", "--batch-size", "16")
    few = ("--epochs", "2", "--precision", "fp32", "--compile", "off")

    refused = run(*line, *few)
    assert refused.code == 2
    assert "Resize them: --image-size 16,16" in refused.err
    torn = run(*line, *few, "--image-size", "16,16")
    assert torn.code == 2
    assert "torn.png: cannot be decoded as an image (no image of a known format)" in torn.err
    assert "--skip-bad 1" in torn.err

    done = run(*line, *few, "--image-size", "16,16", "--skip-bad", "1", "--no-flip")
    assert done.code == 0, done.err
    assert "has none; the student learns from its teacher alone (alpha 0)" in done.err
    assert "augmentation: crop with 2 pixels of padding, no flip\n" in done.err
    manifest = Bundle("deploy").read_complete()
    assert not manifest.data.labeled
    assert (manifest.recipe.augmentation.padding, manifest.recipe.augmentation.flip) == (2, False)

    exported = run("export", "--onnx", "--target", "quick.yaml")
    assert exported.code == 0, exported.err
    verified = run("verify", "--target", "quick.yaml")
    assert verified.code == 0, verified.err
    evaluated = run("evaluate", "deploy", "--json")
    assert evaluated.code == 0, evaluated.err
    assert "agreement" in json.dumps(json.loads(evaluated.out))
    retrieved = run("evaluate", "deploy", "--retrieval")
    assert retrieved.code == 2
    assert "has no labels, or they are not used, and what is retrieved is judged by its class" in retrieved.err
    (tmp_path / "grid.yaml").write_text("data: {source: photos, image_size: [16, 16], skip_bad: 1}\n")
    grid = ("--depths", "8", "--methods", "kd", "--epochs", "2", "--out", "grid")
    compared = run("compare", "grid.yaml", "--teacher", "teacher.safetensors", *grid)
    assert compared.code == 2
    assert "compare ranks methods by accuracy" in compared.err


def test_a_new_network_needs_labels(run: Run, photos: Path) -> None:
    refused = run(
        "train", "resnet8", "--data", "photos", "--image-size", "16,16", "--normalise", "half", "--out", "n.safetensors"
    )
    assert refused.code == 2
    assert "a new network is trained by labels alone" in refused.err
    assert "litdeploy compress" in refused.err


def test_labels_of_a_recipe_are_left_unused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {source: digits, label_column: label}\n")
    made = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    write_checkpoint(tmp_path / "teacher.safetensors", made.module.state_dict(), made.spec)
    done = run("compress", "teacher.safetensors", "--recipe", "r.yaml", "--student-depth", "8", "--epochs", "1",
               "--labels", "none", "--compile", "off")  # fmt: skip
    assert done.code == 0, done.err
    assert Bundle("deploy").read_complete().recipe.data.label_column is None
    labeled = run("evaluate", "deploy", "--labels", "auto", "--json")
    assert labeled.code == 0, labeled.err
    assert "top1" in labeled.out
