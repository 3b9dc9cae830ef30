"""TensorRT engine files: their sidecar, and the checks before an engine is loaded.

An engine is code for one library version and one kind of GPU. The file is what the library wrote; everything else that
is known about it is in its sidecar NAME.json, an `Artefact` whose details are `EngineDetails`.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from litdeploy.errors import DependencyError, RunnerError
from litdeploy.files import is_file
from litdeploy.storage.bundle import read_sidecar, sidecar_of
from litdeploy.storage.records import Artefact, Record

Library = Literal["tensorrt", "tensorrt_rtx"]
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]

INSTALL: dict[Library, str] = {
    # PyPI has only a stub of this name, which downloads the libraries from NVIDIA's index.
    "tensorrt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}


# Such as `10.9.0.34`. A message suggests installing it, so it must not be arbitrary text.
_VERSION = r"\d{1,6}(\.\d{1,6}){1,4}"


class BatchProfile(Record):
    """Batch sizes that an engine takes, from `min` to `max`, tuned for `opt`."""

    min: int = Field(ge=1)
    opt: int
    max: int

    @model_validator(mode="after")
    def _check(self) -> BatchProfile:
        if not self.min <= self.opt <= self.max:
            raise ValueError("needs min ≤ opt ≤ max")
        return self

    @classmethod
    def of(cls, batch_sizes: tuple[int, ...]) -> BatchProfile:
        """The profile of a target's batch sizes: smallest, middle (the lower of two) and largest."""
        ordered = sorted(batch_sizes)
        return cls(min=ordered[0], opt=ordered[(len(ordered) - 1) // 2], max=ordered[-1])


class Precisions(Record):
    """Types that a network is computed and stored in.

    Attributes:
        source: `engine`, as its inspector reports, or `network`, as the strongly typed network it was built from
            requires.
        layers: type → share of the layers that compute, 0–1; layers that only move or convert values do not count.
        weights: type → share of the weights, 0–1.
    """

    source: Literal["engine", "network"]
    layers: dict[str, float]
    weights: dict[str, float]

    def summary(self) -> str:
        """One line: `layers: 93.3 % fp16, 6.7 % fp32; weights: 100.0 % fp16 (as …)`."""
        layers, weights = (
            ", ".join(f"{share:.1%} {name}".replace("%", " %") for name, share in shares.items()) or "none"
            for shares in (self.layers, self.weights)
        )
        return f"layers: {layers}; weights: {weights} ({_SOURCES[self.source]})"


_SOURCES = {"engine": "as the engine's inspector reports", "network": "as the network requires"}


class EngineDetails(Record):
    """Details of an engine in its sidecar, besides its hash, precision and versions.

    Attributes:
        gpu: name of the GPU it was built on; None if it was built without one.
        compute_capabilities: of the GPUs it was built for, such as `8.6`.
        batches: batch sizes it takes.
        input, output: names of the tensors; of several the first.
        inputs: name → shape of every input, as `input_shape`; empty in engines of older versions, which have one input.
        outputs, output_types: the same of every output; empty in engines of older versions, which have one.
        input_shape, output_shape: with the batch; dynamic sizes by name.
        input_type, output_type: `float32`, `float16`, `bfloat16`, `uint8`; of an output also `int64`, `int32`, `bool`.
        metadata: of the ONNX file: normalization of images, names of the classes.
        onnx_sha256: hash of the file it was built from.
        command: the command that built it.
        memory_limit: bytes of device memory that a layer may use for scratch; None if unlimited.
        timing_cache: whether the build started from timings of an earlier one; None if the library has no such cache.
    """

    library: Library
    gpu: str | None
    compute_capabilities: tuple[str, ...]
    version_compatible: bool
    hardware_compatibility: HardwareCompatibility
    batches: BatchProfile
    input: str
    output: str
    inputs: dict[str, tuple[int | str, ...]] = Field(default_factory=dict)
    outputs: dict[str, tuple[int | str, ...]] = Field(default_factory=dict)
    output_types: dict[str, str] = Field(default_factory=dict)
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]
    input_type: str
    output_type: str
    metadata: dict[str, str]
    onnx_sha256: str
    command: str
    memory_limit: int | None
    timing_cache: bool | None
    precisions: Precisions
    bytes: int

    @property
    def every_output(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Name → type and shape, with the batch, of every output."""
        if not self.outputs:
            return {self.output: (self.output_type, self.output_shape)}
        return {name: (self.output_types.get(name, ""), shape) for name, shape in self.outputs.items()}


class Engine:
    """An engine's content, verified against its sidecar."""

    def __init__(self, path: Path, content: bytes, artefact: Artefact, details: EngineDetails) -> None:
        self.path = path
        self.content = content
        self.artefact = artefact
        self.details = details

    @property
    def version(self) -> str:
        """Version of the library that built it."""
        return self.artefact.versions[self.details.library]

    @property
    def command(self) -> str:
        """Command that builds it again."""
        return self.artefact.command or "litdeploy export --trt"

    def check(self, version: str, capability: str) -> None:
        """Check that the installed library and the GPU can run it.

        Args:
            version: of the installed library.
            capability: the GPU's compute capability, such as `8.6`.

        Raises:
            RunnerError: it was built for another version or GPU.
        """
        details = self.details
        if not _runs_in_version(self.version, version, details.version_compatible):
            raise RunnerError(
                f"{self.path}: built by {details.library} {self.version}, but {version} is installed; an engine runs "
                f"only in the version that built it. Build it again: {self.command}\nOr install that version: "
                f"pip install {details.library.replace('_', '-')}=={self.version}"
            )
        if not _runs_on_gpu(details, capability):
            raise RunnerError(
                f"{self.path}: built for GPUs of compute capability {', '.join(details.compute_capabilities)}"
                f"{f' ({details.gpu})' if details.gpu else ''}, but this GPU has {capability}. Build an engine on this "
                "machine: litdeploy export --trt"
            )


def _runs_in_version(built: str, installed: str, compatible: bool) -> bool:
    if not compatible:
        return built == installed
    numbers = [tuple(int(part) for part in version.split(".")[:2]) for version in (built, installed)]
    return numbers[0][0] == numbers[1][0] and numbers[0] <= numbers[1]


def _runs_on_gpu(details: EngineDetails, capability: str) -> bool:
    if details.hardware_compatibility == "ampere-plus":
        return int(capability.split(".")[0]) >= 8
    return capability in details.compute_capabilities


def read_engine(path: Path) -> Engine:
    """Read an engine and verify it against its sidecar. The file is read once: the returned bytes are those hashed.

    Raises:
        RunnerError: the engine or its sidecar is missing or invalid, or the hash differs.
    """
    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Create it: litdeploy export --trt")
    sidecar = sidecar_of(path)
    if not is_file(sidecar):
        raise RunnerError(
            f"{path}: its sidecar {sidecar.name} is missing. An engine is code and is loaded only if the sidecar that "
            "was written with it confirms its hash. Copy that file too, or build both again: litdeploy export --trt"
        )
    try:
        artefact = read_sidecar(path)
        known = {key: value for key, value in artefact.details.items() if key in EngineDetails.model_fields}
        details = EngineDetails.model_validate(known)
        content = path.read_bytes()
        engine = Engine(path, content, artefact, details)
        if not re.fullmatch(_VERSION, engine.version):
            raise KeyError(f"no version: {engine.version[:40]!r}")
    except (ValidationError, KeyError, OSError) as error:
        raise RunnerError(
            f"{sidecar}: not the sidecar of an engine ({_reason(error)}). Build the engine again: "
            "litdeploy export --trt"
        ) from None
    if hashlib.sha256(content).hexdigest() != artefact.sha256:
        raise RunnerError(
            f"{path}: altered or truncated since it was built (its SHA-256 differs from the one in {sidecar.name}). An "
            f"engine is code, so it is not loaded. Build it again: {engine.command}"
        )
    return engine


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(key) for key in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def load_library(name: Library) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        DependencyError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise DependencyError(
            f"{name} is required but cannot be imported ({error}). Install it: {INSTALL[name]}"
        ) from None


@cache
def logger_of(name: Library) -> Any:
    """The library's logger, which collects error messages in `errors`; its user clears them.

    One for the whole process: the library keeps the first logger it is given.
    """
    trt = load_library(name)
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, kind: Any, message: str) -> None:
            # Without a driver this message follows every other error.
            if kind in (severity.ERROR, severity.INTERNAL_ERROR) and "::catchCudaError" not in message:
                self.errors.append(message)

    return Log()


def capability_of(device: torch.device) -> str:
    """A GPU's compute capability, such as `8.6`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
