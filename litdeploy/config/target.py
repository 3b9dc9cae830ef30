"""The target: where the student will run. One YAML file per deployment target in `profiles/`, read by `--target`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from litdeploy.config import settings
from litdeploy.config.formats import runners
from litdeploy.config.settings import Settings


def _known_runner(name: str) -> str:
    if name not in (known := runners()):
        raise ValueError(f"no such runner; those known: {', '.join(known)}")
    return name


RunnerName = Annotated[str, AfterValidator(_known_runner)]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class Timing(Settings):
    """How latency is measured, and how long.

    A measurement ends when the 95 % intervals of both medians are within `half_width` of their middle, after at least
    `min_samples` and `min_seconds`; otherwise at `samples` or `max_seconds`.

    Attributes:
        warmup_ms: least warm-up time of each runner, in milliseconds.
        half_width: largest half width of the intervals, relative to their middle; 0: intervals never end it.
        min_samples: timed calls per side and batch size before the intervals may end it.
        min_seconds: the same in seconds, both sides together: disturbances of a machine come in longer waves.
        samples: most timed calls per side and batch size.
        max_seconds: limit for one runner and batch size, both sides together.
        cold_cache: whether the caches are emptied before each call.
        pace: calls per second, at even intervals; None: one call after another.
        processes: new processes in which all measurements are repeated, one after another; 1: all in this process.
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
                "cold_cache and pace exclude each other, since caches cool down between paced calls anyway; leave "
                "one of the two out (--cold-cache, --pace)"
            )
        return self


class Tolerance(Settings):
    """How far an exported file may be from PyTorch: |file − reference| ≤ atol + rtol · max |reference|.

    Attributes:
        atol: absolute tolerance, in units of the output.
        rtol: tolerance relative to the largest magnitude in the reference's output.
        top1: least share of images with the same class in both outputs.
        psnr, ssim: least similarity of generated images to the reference's, in dB and 0–1, instead of the others.
        cosine: least cosine of each embedding to the reference's.
        accuracy: largest drop in the share of correctly classified images. One image is always allowed: on a small
            test split a single image is more than this share.
    """

    atol: float = Field(1e-4, ge=0)
    rtol: float = Field(1e-4, ge=0)
    top1: float = Field(0.999, ge=0, le=1)
    psnr: float = Field(80.0, ge=0)
    ssim: float = Field(0.9999, ge=0, le=1)
    cosine: float = Field(0.99999, ge=-1, le=1)
    accuracy: float = Field(0.001, ge=0, le=1)


# fp32: the same arithmetic in another order; the rounding errors (6e-8 each) of dozens of layers stay below 1e-4.
# fp16, bf16: 11 and 8 significant bits, hence errors up to 5e-4 and 4e-3 at each of dozens of roundings, which partly
#   cancel; classes that close to one another change places, for better as often as for worse.
# int8: 256 steps for the range of each tensor. The logits move visibly; the class is what counts.
_TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "atol": 1e-4,
        "rtol": 1e-4,
        "top1": 0.999,
        "accuracy": 0.001,
        "psnr": 80,
        "ssim": 0.9999,
        "cosine": 0.99999,
    },
    "fp16": {"atol": 1e-2, "rtol": 1e-2, "top1": 0.99, "accuracy": 0.001, "psnr": 45, "ssim": 0.995, "cosine": 0.9999},
    "bf16": {"atol": 5e-2, "rtol": 5e-2, "top1": 0.97, "accuracy": 0.001, "psnr": 30, "ssim": 0.97, "cosine": 0.998},
    "int8": {"atol": 2e-1, "rtol": 2e-1, "top1": 0.95, "accuracy": 0.005, "psnr": 25, "ssim": 0.9, "cosine": 0.95},
}


class Tolerances(Settings):
    """The tolerance of each precision; values that are not given keep their defaults."""

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
        device: `cpu`, `cuda`, or `auto` for CUDA if it is available.
        compute_capability: the GPU's (`9.0`), for files that are compiled for it; None for a CPU, or any GPU.
        memory_limit: device memory that the student may use, in GiB; None: no limit.
        precisions: precisions that the device computes in.
        runners: the backends to measure.
        compile_mode: mode of torch.compile in the runner `compiled`.
        batch_sizes: images or texts per call. Exported files are verified at the smallest, middle and largest.
        opset: ONNX operator set; None: the exporter's default.
        tolerance: how far an exported file of each precision may be from the student.
        timing: how latency is measured.
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
        """The smallest, middle and largest batch size."""
        sizes = self.batch_sizes
        return sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]

    @field_validator("batch_sizes")
    @classmethod
    def _batch_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or min(sizes) < 1:
            raise ValueError("needs at least one batch size, and all of at least 1")
        return tuple(sorted(set(sizes)))

    @field_validator("runners", "precisions")
    @classmethod
    def _one_or_more(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("needs at least one")
        return tuple(dict.fromkeys(names))


def read_target(name_or_path: str | Path) -> Target:
    """Read a target by name (`cpu`) or path.

    Raises:
        SettingsError: see `settings.read`.
    """
    return settings.read(Target, name_or_path, "profiles")


def with_timing(target: Target, changes: Mapping[str, Any]) -> Target:
    """Return the target with some fields of its timing changed; None leaves a field unchanged.

    Raises:
        SettingsError: an unknown field, or a wrong value.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        return target
    timing = settings.parse(Timing, {**target.timing.model_dump(mode="json"), **given}, "timing")
    return target.model_copy(update={"timing": timing})
