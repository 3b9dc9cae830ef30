from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from litdeploy.config.recipe import Recipe
from litdeploy.errors import NetworkError, SettingsError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import build, load
from litdeploy.networks.width import scales_of
from litdeploy.trainer import compress
from litdeploy.trainer.methods import Start
from litdeploy.trainer.methods.slimming import Removal, slimming
from litdeploy.trainer.objectives import Outputs
from tests.trainer.methods.conftest import SECTIONS, MakeRun
from tests.trainer.test_compress import QUICK

RECIPE = Recipe.model_validate({"method": "slimming", "slimming": {"sparsity": 0.5}})


def test_the_loss_is_cross_entropy_and_the_scales_penalty(make_run: MakeRun) -> None:
    """Whose gradient is the s · sign(γ) that the authors' code adds to that of the loss."""
    student = make_run(RECIPE).student
    scales = scales_of(student)
    with torch.no_grad():
        for index, scale in enumerate(scales):
            scale.copy_(torch.linspace(-1, 2, len(scale)) + index)
    sparse, _ = slimming(RECIPE, Start(SECTIONS, student=student))
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    found = sparse.objective.losses(Outputs(logits, labels))
    to_labels = -logits.log_softmax(1)[range(6), labels].mean()
    penalty = sum(abs(value) for scale in scales for value in scale.tolist())
    torch.testing.assert_close(found["loss"], to_labels + 0.5 * penalty)
    found["loss"].backward()
    assert all(torch.equal(scale.grad, 0.5 * scale.sign()) for scale in scales if scale.grad is not None)
    assert all(scale.grad is not None for scale in scales)


def test_there_is_an_epoch_on_each_side_of_the_removal() -> None:
    for epochs, expected in ((2, [1, 1]), (3, [2, 1]), (10, [9, 1]), (40, [36, 4])):
        phases = slimming(RECIPE.with_epochs(epochs), Start(SECTIONS))
        assert [phase.settings.epochs for phase in phases] == expected
        assert [phase.transition is not None for phase in phases] == [False, True]
    with pytest.raises(SettingsError, match="--epochs 2"):
        slimming(RECIPE.with_epochs(1), Start(SECTIONS))


def test_the_spec_rebuilds_what_is_left(make_run: MakeRun) -> None:
    """All that a run needs to go on behind the removal is the student's spec and weights."""
    run = make_run(RECIPE, "resnet14,width=4,shortcut=B")
    for scale in scales_of(run.student):
        torch.nn.init.uniform_(scale)
    Removal(0.6).apply(run)
    again = build(run.spec, None, "here")
    again.load_state_dict(run.student.state_dict())
    run.student.eval()
    torch.testing.assert_close(again.eval()(run.example), run.student(run.example))
    assert run.student.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.spec.plan == dict.fromkeys(SECTIONS, (0, 1))


def plain() -> nn.Module:
    """No repeated blocks."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(16, 10)),
    )


def test_a_network_without_sections(tmp_path: Path) -> None:
    teacher = load(plain(), input_shape=(1, 8, 8), normalise="half")
    quick = {**QUICK, "student_depth": None, "method": "slimming"}
    bundle = compress(teacher, out=tmp_path / "deploy", **quick)
    student = load(bundle.student_path, network=plain())
    sizes = [sum(value.numel() for value in each.module.parameters()) for each in (teacher, student)]
    assert sizes[1] < sizes[0]
    with pytest.raises(NetworkError, match="no repeated blocks"):
        compress(teacher, out=tmp_path / "fresh", init="fresh", network=plain, **quick)


def test_on_digits(teacher_path: Path, tmp_path: Path) -> None:
    quick = {**QUICK, "student_depth": None, "method": "slimming", "epochs": 3}
    settings = {"sparsity": 0.01, "prune_ratio": 0.5}
    bundle = compress(teacher_path, out=tmp_path / "deploy", slimming=settings, **quick)
    manifest = bundle.read_complete()
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["sparse", "cut", "finetune", "finetune"]
    teacher, student = load(teacher_path), load(bundle.student_path)
    assert student.spec == manifest.student
    sizes = [sum(value.numel() for value in each.module.parameters()) for each in (teacher, student)]
    assert sizes[1] < 0.8 * sizes[0]
    found = [inspect(path) for path in (teacher_path, bundle.student_path)]
    assert all(isinstance(each, FoundNetwork) for each in found)
    wide, slim = (each.breakdown for each in found if isinstance(each, FoundNetwork))
    assert slim.flops < 0.8 * wide.flops
    assert (slim.depth, [part.name for part in slim.parts]) == (wide.depth, [part.name for part in wide.parts])
    path = tmp_path / "student.onnx"
    export_onnx(student, path, None)
    images = student.example(3)
    with torch.no_grad():
        expected = student.module(images).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
