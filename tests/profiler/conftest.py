"""A made-up report, and a real bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import litdeploy
from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.config.target import Target, Tolerance
from litdeploy.networks import build, new
from litdeploy.profiler.analysis.verdict import sentence
from litdeploy.profiler.measure.statistics import compare_sides, summarize
from litdeploy.profiler.schema import (
    Breakdown,
    Conditions,
    Deviation,
    Environment,
    Failure,
    Fidelity,
    Finding,
    Measurement,
    Part,
    PredictedStudent,
    Prediction,
    Report,
    SectionTime,
    Side,
    SideTiming,
)
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import Accuracy, BatchParity, DataRecord, Manifest, Parity, RunRecord, TeacherRecord


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With two threads, each operator waits for both: for milliseconds if another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HOSTILE = '"><script>alert("$x$")</script>ß漢'


def row(epoch: int, **values: object) -> dict[str, object]:
    """A line of metrics.jsonl."""
    phase = "lit" if epoch <= 4 else "finetune"
    return {
        "phase": phase,
        "epoch": epoch,
        "epochs": 5,
        "loss": 2 / epoch,
        "validation_top1": 1 - 0.5 / epoch,
        **values,
    }


def side(name: str, depth: int, blocks: int, accuracy: float) -> Side:
    section = Part(name="layer1", blocks=blocks, parameters=90_000 * blocks, flops=14_000_000 * blocks)
    rest = Part(name="stem and head", blocks=None, parameters=1_098, flops=885_000)
    return Side(
        name=name,
        network=f"resnet,depth={depth}",
        plan=None,
        path=f"{name}.pt",
        sha256="0f" * 32,
        bytes=4 * (section.parameters + rest.parameters),
        breakdown=Breakdown(
            depth=depth,
            depth_unit="layers",
            parameters=section.parameters + rest.parameters,
            flops=section.flops + rest.flops,
            parts=(section, rest),
        ),
        accuracy={
            "test": Accuracy(top1=accuracy, loss=0.4, images=10_000),
            "validation": Accuracy(top1=accuracy + 0.004, loss=0.3, images=5_000),
        },
    )


def measurement(runner: str, batch_size: int, teacher_ms: float, student_ms: float) -> Measurement:
    """Medians as given; a spread of 4 %."""
    samples = [[ms * (0.96 + 0.001 * index) for index in range(80)] for ms in (teacher_ms, student_ms)]
    artefact = "deploy/export/student.onnx" if runner == "onnxruntime" else None
    teacher, student = (
        SideTiming(
            **summarize(each, batch_size).model_dump(), first_run_ms=2 * each[0], load_seconds=0.1, artefact=artefact
        )
        for each in samples
    )
    return Measurement(
        runner=runner,
        mode="CPUExecutionProvider",
        device="cpu",
        precision="fp32",
        batch_size=batch_size,
        clock="wall",
        scenario="warm",
        pace=None,
        stopped="settled",
        overhead_ms=0.0004,
        conditions=Conditions(seconds=2.0, other_load=0.1, preemptions=3),
        teacher=teacher,
        student=student,
        comparison=compare_sides(*samples),
    )


def fidelity() -> Fidelity:
    return Fidelity(
        images=256,
        deviations=(
            Deviation(name="stem", on_teacher=0.0, on_own=0.0),
            Deviation(name="layer1", on_teacher=0.13, on_own=0.13),
            Deviation(name="logits", on_teacher=0.0, on_own=0.21),
        ),
        same_class_on_teacher=1.0,
        same_class_on_own=0.88,
    )


def parity() -> Parity:
    batches = (
        BatchParity(batch_size=1, images=64, max_absolute=3.1e-6, max_relative=2e-7, top1=1.0, within=True),
        BatchParity(batch_size=8, images=64, max_absolute=None, max_relative=None, top1=0.5, within=False),
    )
    return Parity(reference="eager", candidate="onnxruntime", tolerance=Tolerance(), batches=batches, within=False)


def hostile(report: Report) -> Report:
    """A report in which every value that comes from a file is a script."""
    side = report.teacher.model_copy(update={"name": HOSTILE, "path": HOSTILE, "network": HOSTILE})
    part = report.teacher.breakdown.parts[0].model_copy(update={"name": HOSTILE})
    sizes = report.teacher.breakdown.model_copy(update={"parts": (part, report.teacher.breakdown.parts[1])})
    return report.model_copy(
        update={
            "verdict": f"{HOSTILE} <b> {HOSTILE}",
            "bundle": HOSTILE,
            "teacher": side.model_copy(update={"breakdown": sizes}),
            "student": side,
            "measurements": tuple(each.model_copy(update={"mode": HOSTILE}) for each in report.measurements),
            "parity": parity().model_copy(update={"reference": HOSTILE, "candidate": HOSTILE}),
            "training": ({"phase": HOSTILE, "epoch": 1, "loss": 1.0}, {"phase": "x", "epoch": 2, "loss": HOSTILE}),
            "section_times": (report.section_times[0].model_copy(update={"name": HOSTILE}), report.section_times[1]),
            "failures": (Failure(runner=HOSTILE, batch_size=1, message=HOSTILE),),
            "findings": (report.findings[0].model_copy(update={"sentence": HOSTILE, "runner": HOSTILE}),),
            "fidelity": fidelity().model_copy(
                update={"deviations": (Deviation(name=HOSTILE, on_teacher=0.1, on_own=None), *fidelity().deviations)}
            ),
            "commands": (HOSTILE,),
            "environment": report.environment.model_copy(update={"system": HOSTILE, "versions": {HOSTILE: HOSTILE}}),
            "data": report.data.model_copy(update={"source": HOSTILE, "images": {HOSTILE: 1}}),
            "recipe": report.recipe.model_copy(update={"network": HOSTILE}),
        }
    )


def prediction() -> Prediction:
    """Students of three depths in two runners at two batch sizes, and one that failed."""
    teacher = side("ResNet-56", 56, 9, 0.9)
    failure = Failure(runner="compiled", batch_size=None, message="there is no compiler here")
    students = tuple(
        PredictedStudent(
            name=f"ResNet-{depth}",
            depth=depth,
            plan={"layer1": tuple(range(blocks))},
            breakdown=side("", depth, blocks, 0.9).breakdown,
            depth_ratio=56 / depth,
            parameter_ratio=9 / blocks,
            flop_ratio=9 / blocks,
            measurements=tuple(
                measurement(runner, batch_size, 9.0 * batch_size, blocks * batch_size)
                for runner in ("eager", "onnxruntime")
                for batch_size in (1, 8)
            ),
            failures=(failure,),
        )
        for depth, blocks in ((8, 1), (20, 3), (32, 5))
    )
    return Prediction(
        teacher=teacher.name,
        path="teacher.pt",
        breakdown=teacher.breakdown,
        students=students,
        environment=environment(),
        target=Target(),
    )


def environment() -> Environment:
    return Environment(
        device="cpu",
        device_name="a processor",
        cores=2,
        threads=2,
        load_average=0.4,
        system="Linux",
        python="3.11",
        litdeploy="0.1.0",
        versions={"torch": "2.13"},
        date="2026-01-02T03:04:05+00:00",
    )


@pytest.fixture
def report() -> Report:
    return whole_report()


def whole_report() -> Report:
    """A report with content in every part."""
    teacher, student = side("ResNet-56", 56, 9, 0.8944), side("ResNet-20", 20, 3, 0.8906)
    measurements = tuple(
        measurement(runner, batch_size, base * batch_size**0.9, base * batch_size**0.9 / 2.6)
        for runner, base in (("eager", 14.0), ("compiled", 7.0), ("onnxruntime", 5.0))
        for batch_size in (1, 8, 64)
    )
    return Report(
        verdict=sentence(teacher, student, measurements[6], "a processor"),
        bundle="deploy",
        student_sha256="0f" * 32,
        onnx_sha256=None,
        teacher=teacher,
        student=student,
        depth_ratio=2.8,
        parameter_ratio=3.0,
        flop_ratio=2.9,
        measurements=measurements,
        failures=(),
        section_times=(
            SectionTime(name="layer1", batch_size=1, teacher_ms=12.0, student_ms=4.0),
            SectionTime(name="stem and head", batch_size=1, teacher_ms=2.0, student_ms=2.0),
        ),
        findings=(
            Finding(
                kind="ideal ratio",
                sentence="A ratio of FLOPs of 2.90 made 2.60 in time.",
                figures={"flop_ratio": 2.9, "speedup": 2.6},
            ),
        ),
        fidelity=fidelity(),
        parity=parity(),
        training=tuple(row(epoch) for epoch in range(1, 6)),
        data=DataRecord(source="digits", fingerprint="ab", images={"train": 1_400, "test": 360}),
        test_used_once=True,
        environment=environment(),
        recipe=Recipe(student_depth=20),
        target=Target(),
        commands=("litdeploy profile",),
    )


@dataclass(frozen=True)
class Made:
    """A small bundle, and its teacher's file."""

    bundle: Bundle
    teacher: Path


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """ResNet-14 → ResNet-8 on 1×8×8 images, not trained."""
    teacher = new("resnet,depth=14,in_channels=1,width=4", normalise="none", input_shape=(1, 8, 8), classes=10, seed=0)
    file = tmp_path / "teacher.safetensors"
    teacher_sha256 = write_checkpoint(file, teacher.module.state_dict(), teacher.spec)
    spec = teacher.spec.with_(plan={"layer1": (0,), "layer2": (0,), "layer3": (0,)})
    bundle = Bundle(tmp_path / "deploy")
    bundle.claim(overwrite=False)
    student_sha256 = write_checkpoint(bundle.student_path, build(spec, None, "test").state_dict(), spec)
    bundle.metrics_path.write_text("".join(json.dumps(row(epoch)) + "\n" for epoch in (1, 2)))
    accuracy = {"test": Accuracy(top1=0.9, loss=0.3, images=360)}
    bundle.write(
        Manifest(
            litdeploy=litdeploy.__version__,
            status="complete",
            teacher=TeacherRecord(path=str(file), sha256=teacher_sha256, spec=teacher.spec),
            student=spec,
            student_sha256=student_sha256,
            recipe=Recipe(student_depth=8, data=DataSettings(source="digits")),
            data=DataRecord(source="digits", fingerprint="ab", images={"train": 1_000, "test": 360}),
            run=RunRecord(
                started="2026-01-02T03:04:05+00:00",
                seconds=1.0,
                images_per_second=1.0,
                epochs=2,
                device="cpu",
                precision="fp32",
                versions={},
            ),
            metrics={"teacher": accuracy, "student": accuracy},
        )
    )
    return Made(bundle, file)
