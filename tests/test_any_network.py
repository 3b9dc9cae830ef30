"""The whole way of networks that are no classifiers: compress, evaluate, export, verify and profile, without labels.

Each row is a network of random weights; what it returns decides the task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import litdeploy
from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Target, Timing
from litdeploy.networks import load
from litdeploy.runtime.onnx_file import describe_onnx
from litdeploy.storage.records import Measures

TARGET = Target(device="cpu", runners=("eager",), batch_sizes=(1, 4), timing=Timing(samples=8, max_seconds=0.2))
IMAGES = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0.5 * self.conv(x).relu()
        return y


class Images(nn.Module):
    """A stem and four blocks."""

    input_spec = IMAGES

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))


class TwoHeads(Images):
    """Boxes, scores, and the class with the highest score."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.blocks(self.stem(images)).mean((2, 3))
        scores = self.scores(pooled)
        return {"boxes": self.boxes(pooled), "scores": scores, "label": scores.argmax(1)}


class Regression(Images):
    """One number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return values[:, 0]


class UNet(Images):
    """Five classes for each pixel, with a way past the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 8, 2, stride=2), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        wide = self.stem(images).relu()
        logits: Tensor = self.head(torch.cat([wide, self.up(self.blocks(self.down(wide)))], 1))
        return logits


def segformer() -> nn.Module:
    """A SegFormer, whose logits have a quarter of the image's resolution."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 3],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    module: nn.Module = transformers.SegformerForSemanticSegmentation(config)
    module.input_spec = InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)  # type: ignore[assignment]
    return module


@dataclass(frozen=True)
class Row:
    """A network, the sections to shorten, and what is expected of it.

    Attributes:
        outputs: name → sizes of the outputs in a file.
        measures: names of what it is measured by, the main one first.
        runners: in which it is profiled; a file of the teacher takes as long as one of the student.
    """

    make: Callable[[], nn.Module]
    blocks: dict[str, int]
    task: str
    outputs: dict[str, list[int | str]]
    measures: tuple[str, ...]
    runners: tuple[str, ...] = ("eager",)


ROWS = {
    "two heads": Row(
        TwoHeads,
        {"blocks": 2},
        "tree",
        {"boxes": ["batch", 4], "scores": ["batch", 5], "label": ["batch"]},
        ("relative_error", "relative_error/boxes", "relative_error/scores", "equal/label"),
        ("eager", "onnxruntime"),
    ),
    "regression": Row(Regression, {"blocks": 2}, "tree", {"output": ["batch"]}, ("relative_error",)),
    "U-Net": Row(
        UNet, {"blocks": 2}, "dense", {"logits": ["batch", 5, 16, 16]}, ("pixel_agreement", "pixel_divergence")
    ),
    "SegFormer": Row(
        segformer,
        {"segformer.stages.1.blocks": 2},
        "dense",
        {"logits": ["batch", 5, 8, 8]},
        ("pixel_agreement", "pixel_divergence"),
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without labels."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.RandomState(0)
    for index in range(48):
        color, at = draw.randint(0, 255, 3), draw.randint(0, 24, 2)
        pixels = np.full((32, 32, 3), 128, np.uint8)
        pixels[at[0] : at[0] + 8, at[1] : at[1] + 8] = color
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_the_whole_way(name: str, images: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    teacher = load(row.make().eval())
    assert teacher.spec.task_name == row.task
    size = teacher.spec.input.shape[1:]
    bundle = litdeploy.compress(
        teacher,
        data={"source": str(images), "image_size": size},
        student_blocks=row.blocks,
        epochs=2,
        batch_size=8,
        optimiser="adamw",
        learning_rate=1e-3,
        compile="off",
        device="cpu",
        out=tmp_path / "deploy",
    )
    manifest = bundle.read()
    test = manifest.metrics["student"]["test"]
    assert isinstance(test, Measures)
    assert tuple(test.values) == row.measures
    assert litdeploy.evaluate(bundle.path, network=teacher.module).model_dump() == test.model_dump()

    exported = litdeploy.export(bundle, target=TARGET, network=teacher.module)
    path = bundle.artefact_path(exported.artefacts["onnx"])
    assert describe_onnx(path)["outputs"] == row.outputs
    verified = litdeploy.verify(bundle, target=TARGET, network=teacher.module)
    assert verified.within
    assert [each.error for each in verified.differences] == ["compression", "conversion"]
    target = TARGET.model_copy(update={"runners": row.runners})
    report = litdeploy.profile(bundle, target=target, network=teacher.module)
    assert {each.runner for each in report.measurements} == set(row.runners)
    assert not report.failures
    assert "not compared with labels" in report.verdict
    assert (bundle.profile_path / "report.html").is_file()


@pytest.mark.parametrize("name", ["two heads", "SegFormer"])
def test_a_network_that_nobody_compressed(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    exports = litdeploy.export(row.make().eval(), out=tmp_path / "exported", target=TARGET)
    assert describe_onnx(tmp_path / "exported" / "network.onnx")["outputs"] == row.outputs
    assert exports.artefacts["onnx"].details["parity"]["within"]


def test_a_language_model_that_generates_leaves_in_the_form_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
    module = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(litdeploy.errors.NetworkError, match=r"GPT2LMHeadModel generates.* --transformers DIR"):
        litdeploy.export(module, out=tmp_path / "exported", target=TARGET)
