"""The target: what `export` and `profile` do their work for. One YAML file a deployment target in `profiles/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from litdeploy.config import settings
from litdeploy.config.settings import Settings

RunnerName = Literal["eager", "compiled", "onnxruntime", "onnxruntime-graph", "inductor", "tensorrt", "tensorrt-graph"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class Timing(Settings):
    """When to measure, and how much.

    A measurement ends when both medians' 95 % intervals are within `half_width` of their middle, once it has
    `min_samples` and took `min_seconds`; else at `samples` or `max_seconds`.

    Attributes:
        warmup_ms: least time that each runner is warmed up for, in milliseconds.
        half_width: of the intervals, relative to their middle; 0: it never ends by them.
        min_samples: calls timed a side and batch size before it may end by its intervals.
        min_seconds: the same in seconds, both sides together: what disturbs a machine comes and goes in longer waves.
        samples: most calls timed a side and batch size.
        max_seconds: limit for one runner and batch size, both sides together.
        cold_cache: whether the caches are emptied before each call.
        pace: calls a second, at even times; None: one after the other.
        processes: fresh processes in which the whole is repeated, one after the other; 1: all in this process.
    """

    warmup_ms: float = Field(200.0, ge=0)
    half_width: float = Field(0.01, ge=0, lt=1)
    min_samples: int = Field(64, ge=8)
    min_seconds: float = Field(1.0, ge=0)
    samples: int = Field(5_000, ge=8)
    max_seconds: float = Field(20.0, gt=0)
    cold_cache: bool = False
    pace: float | None = Field(None, gt=0)
    processes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_scenario(self) -> Timing:
        if self.cold_cache and self.pace is not None:
            raise ValueError(
                "cold_cache and pace exclude each other, since caches cool by themselves between paced calls; leave "
                "one of the two out (--cold-cache, --pace)"
            )
        return self


class Tolerance(Settings):
    """How far an artefact may be from PyTorch: |artefact − reference| ≤ atol + rtol · max |reference|.

    Attributes:
        atol: absolute, in units of the logits.
        rtol: relative to the largest magnitude in the reference's output.
        top1: least share of images on which both give the same class.
        psnr, ssim: of a network that makes images, in place of the others: least likeness to the reference's, in dB
            and 0–1.
        accuracy: most that the share of rightly classified images may fall by. One image less is always allowed: on a
            small test split a single image is more than this share.
    """

    atol: float = Field(1e-4, ge=0)
    rtol: float = Field(1e-4, ge=0)
    top1: float = Field(0.999, ge=0, le=1)
    psnr: float = Field(80.0, ge=0)
    ssim: float = Field(0.9999, ge=0, le=1)
    accuracy: float = Field(0.001, ge=0, le=1)


# fp32: the same arithmetic in another order; the rounding (6e-8 a step) of some dozens of layers stays below 1e-4.
# fp16, bf16: 11 and 8 significant bits, hence up to 5e-4 and 4e-3 at each of some dozens of roundings that partly
#   cancel; classes that lie that near to one another change places, which costs as often as it gains.
# int8: 256 steps for each tensor's range. The logits move visibly; what counts is the class.
_TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"atol": 1e-4, "rtol": 1e-4, "top1": 0.999, "accuracy": 0.001, "psnr": 80, "ssim": 0.9999},
    "fp16": {"atol": 1e-2, "rtol": 1e-2, "top1": 0.99, "accuracy": 0.001, "psnr": 45, "ssim": 0.995},
    "bf16": {"atol": 5e-2, "rtol": 5e-2, "top1": 0.97, "accuracy": 0.001, "psnr": 30, "ssim": 0.97},
    "int8": {"atol": 2e-1, "rtol": 2e-1, "top1": 0.95, "accuracy": 0.005, "psnr": 25, "ssim": 0.9},
}


class Tolerances(Settings):
    """A tolerance for each precision; what is not given of one stays at its default."""

    fp32: Tolerance
    fp16: Tolerance
    bf16: Tolerance
    int8: Tolerance

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        wholes = {
            name: {**default, **given[name]} if isinstance(given.get(name), dict) else given.get(name, default)
            for name, default in _TOLERANCES.items()
        }
        return {**given, **wholes}


class Target(Settings):
    """Where the student will run.

    Attributes:
        device: `auto` takes CUDA where there is one.
        compute_capability: of the GPU (`9.0`), for what is compiled for it; None for a processor, or any GPU.
        memory_limit: device memory that the student may use, in GiB; None: no limit.
        precisions: those that it computes in.
        runners: the backends that are measured.
        compile_mode: of torch.compile, in the runner `compiled`.
        batch_sizes: images a call. Artefacts are verified at the least, the middle and the largest.
        opset: ONNX operator set; None for the exporter's own.
        tolerance: how far an artefact of each precision may be from the student.
    """

    device: str = "auto"
    compute_capability: str | None = Field(None, pattern=r"^\d+\.\d$")
    memory_limit: float | None = Field(None, gt=0)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
    runners: tuple[RunnerName, ...] = ("eager", "compiled", "onnxruntime")
    compile_mode: CompileMode = "default"
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    opset: int | None = Field(None, ge=18)
    tolerance: Tolerances = Tolerances()  # type: ignore[call-arg]  # completed by its validator
    timing: Timing = Timing()

    @property
    def batch_profile(self) -> tuple[int, int, int]:
        """The least, the middle and the largest batch size."""
        sizes = self.batch_sizes
        return sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]

    @field_validator("batch_sizes")
    @classmethod
    def _batch_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or min(sizes) < 1:
            raise ValueError("needs one batch size of at least 1 or more")
        return tuple(sorted(set(sizes)))

    @field_validator("runners", "precisions")
    @classmethod
    def _one_or_more(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("needs at least one")
        return tuple(dict.fromkeys(names))


def read_target(name_or_path: str | Path) -> Target:
    """Reads a target by name (`cpu`) or path.

    Raises:
        SettingsError: see `settings.read`.
    """
    return settings.read(Target, name_or_path, "profiles")


def with_timing(target: Target, changes: Mapping[str, Any]) -> Target:
    """The target with some fields of its timing changed; None leaves one as it is.

    Raises:
        SettingsError: an unknown field, or a wrong value.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        return target
    timing = settings.parse(Timing, {**target.timing.model_dump(mode="json"), **given}, "timing")
    return target.model_copy(update={"timing": timing})
