"""The target: what `export` and `profile` do their work for. One YAML file a deployment target in `profiles/`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from litdeploy import settings
from litdeploy.settings import Settings

RunnerName = Literal["eager", "compiled", "onnxruntime"]


class Timing(Settings):
    """When to measure, and how much.

    Attributes:
        warmup_ms: least time that each runner is warmed up for, in milliseconds.
        samples: calls timed a side and batch size, unless `max_seconds` comes first.
        max_seconds: limit for one runner and batch size, both sides together.
    """

    warmup_ms: float = Field(200.0, ge=0)
    samples: int = Field(200, ge=8)
    max_seconds: float = Field(20.0, gt=0)


class Tolerance(Settings):
    """How far an artefact may be from PyTorch: |artefact − reference| ≤ atol + rtol · max |reference|.

    Attributes:
        atol: absolute, in units of the logits.
        rtol: relative to the largest magnitude in the reference's output.
        top1: least share of images on which both give the same class.
    """

    atol: float = Field(1e-4, ge=0)
    rtol: float = Field(1e-4, ge=0)
    top1: float = Field(0.999, ge=0, le=1)


class Target(Settings):
    """Where the student will run.

    Attributes:
        device: `auto` takes CUDA where there is one.
        runners: the backends that are measured.
        batch_sizes: images a call; the largest is also verified after export.
        opset: ONNX operator set; None for the exporter's own.
    """

    device: str = "auto"
    runners: tuple[RunnerName, ...] = ("eager", "compiled", "onnxruntime")
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    opset: int | None = Field(None, ge=18)
    tolerance: Tolerance = Tolerance()
    timing: Timing = Timing()

    @field_validator("batch_sizes")
    @classmethod
    def _batch_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or min(sizes) < 1:
            raise ValueError("needs one batch size of at least 1 or more")
        return tuple(sorted(set(sizes)))

    @field_validator("runners")
    @classmethod
    def _runners(cls, runners: tuple[RunnerName, ...]) -> tuple[RunnerName, ...]:
        if not runners:
            raise ValueError("needs at least one runner")
        return tuple(dict.fromkeys(runners))


def read_target(name_or_path: str | Path) -> Target:
    """Reads a target by name (`cpu`) or path.

    Raises:
        SettingsError: see `settings.read`.
    """
    return settings.read(Target, name_or_path, "profiles")
