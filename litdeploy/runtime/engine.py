"""TensorRT engines as files: what is written beside one, and what is checked before one is loaded.

An engine is code for one library version and one kind of GPU. The file itself stays pure; all that is known of it is
in its sidecar NAME.json, an `Artefact` whose details are `EngineDetails`.
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
    # What PyPI holds under this name is a stub that fetches the libraries from NVIDIA's own index.
    "tensorrt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
    "tensorrt_rtx": "pip install tensorrt-rtx (it is on pypi.org)",
}


# As `10.9.0.34`; it is shown as what to install.
_VERSION = r"\d{1,6}(\.\d{1,6}){1,4}"


class BatchProfile(Record):
    """The batch sizes that an engine takes, from `min` to `max`; `opt` is the one that it is tuned for."""

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
    """In which types a network is computed and stored.

    Attributes:
        source: `engine`, as its inspector tells what was built, or `network`, as the strongly typed network that it
            is built from demands.
        layers: type → share of the layers that compute, 0–1. What only moves or converts values does not count.
        weights: type → share of the weights, 0–1.
    """

    source: Literal["engine", "network"]
    layers: dict[str, float]
    weights: dict[str, float]

    def told(self) -> str:
        """In one line: `layers: 93.3 % fp16, 6.7 % fp32; weights: 100.0 % fp16 (as …)`."""
        layers, weights = (
            ", ".join(f"{share:.1%} {name}".replace("%", " %") for name, share in shares.items()) or "none"
            for shares in (self.layers, self.weights)
        )
        return f"layers: {layers}; weights: {weights} ({_SOURCES[self.source]})"


_SOURCES = {"engine": "as the engine's inspector says", "network": "as the network demands"}


class EngineDetails(Record):
    """What a sidecar says of an engine, beside its hash, precision and versions.

    Attributes:
        gpu: name of the one that it was built on; None where there was none.
        compute_capabilities: of the GPUs that it was built for: `8.6`.
        batches: what it takes.
        input, output: names of the tensors; of several inputs the first, which has images.
        inputs: name → shape of all, as `input_shape`; of an engine of before: none, it has one.
        input_shape, output_shape: with the batch, by name where it is free.
        input_type, output_type: `float32`, `float16`, `bfloat16` or `uint8`.
        metadata: of the ONNX file: how images are normalised, the names of the classes.
        onnx_sha256: of the file that it was built from.
        command: what was typed.
        memory_limit: bytes of device memory that a layer may use for scratch; None: no limit of ours.
        timing_cache: whether timings of an earlier build were there to start from; None: the library has none.
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


class Engine:
    """An engine's content, as its sidecar vouches for it."""

    def __init__(self, path: Path, content: bytes, artefact: Artefact, details: EngineDetails) -> None:
        self.path = path
        self.content = content
        self.artefact = artefact
        self.details = details

    @property
    def version(self) -> str:
        """Of the library that built it."""
        return self.artefact.versions[self.details.library]

    @property
    def command(self) -> str:
        """What to type to build it again."""
        return self.artefact.command or "litdeploy export --trt"

    def check(self, version: str, capability: str) -> None:
        """Holds it against the library and the GPU at hand.

        Args:
            version: of the installed library of its kind.
            capability: the GPU's compute capability, as in `8.6`.

        Raises:
            RunnerError: it was built for others; says what differs and what to type.
        """
        details = self.details
        if not _serves_version(self.version, version, details.version_compatible):
            raise RunnerError(
                f"{self.path}: built by {details.library} {self.version}, and {version} is installed; an engine runs "
                f"in the version that built it. Build it again: {self.command}\nOr install what built it: "
                f"pip install {details.library.replace('_', '-')}=={self.version}"
            )
        if not _serves_gpu(details, capability):
            raise RunnerError(
                f"{self.path}: built for GPUs of compute capability {', '.join(details.compute_capabilities)}"
                f"{f' ({details.gpu})' if details.gpu else ''}, and this one has {capability}. Build one on this "
                "machine: litdeploy export --trt"
            )


def _serves_version(built: str, installed: str, compatible: bool) -> bool:
    if not compatible:
        return built == installed
    numbers = [tuple(int(part) for part in version.split(".")[:2]) for version in (built, installed)]
    return numbers[0][0] == numbers[1][0] and numbers[0] <= numbers[1]


def _serves_gpu(details: EngineDetails, capability: str) -> bool:
    if details.hardware_compatibility == "ampere-plus":
        return int(capability.split(".")[0]) >= 8
    return capability in details.compute_capabilities


def read_engine(path: Path) -> Engine:
    """Reads an engine, once its sidecar vouches for it. What was hashed is what is given: the file is read once.

    Raises:
        RunnerError: it or its sidecar is missing or no engine's, or its hash differs.
    """
    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Make it: litdeploy export --trt")
    sidecar = sidecar_of(path)
    if not is_file(sidecar):
        raise RunnerError(
            f"{path}: nothing vouches for it. An engine is code, and is loaded only beside the sidecar that was "
            f"written with it; there is no {sidecar.name}. Bring that, or build it again: litdeploy export --trt"
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
            f"{sidecar}: not the sidecar of an engine ({_first_line(error)}). Build the engine again: "
            "litdeploy export --trt"
        ) from None
    if hashlib.sha256(content).hexdigest() != artefact.sha256:
        raise RunnerError(
            f"{path}: altered or cut short since it was built (its SHA-256 differs from the one in {sidecar.name}), "
            f"so it is not loaded: an engine is code. Build it again: {engine.command}"
        )
    return engine


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(key) for key in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def load_library(name: Library) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        DependencyError: it is not installed, or its libraries do not load; says what to install, and from where.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise DependencyError(
            f"{name} is needed, and cannot be imported ({error}). Install it: {INSTALL[name]}"
        ) from None


@cache
def logger_of(name: Library) -> Any:
    """The library's logger, whose `errors` are the messages of that kind, in order; its user clears them.

    One for the whole process: the library keeps the first that it is given, for all that it makes.
    """
    trt = load_library(name)
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, kind: Any, message: str) -> None:
            # Without a driver, it follows whatever else goes wrong.
            if kind in (severity.ERROR, severity.INTERNAL_ERROR) and "::catchCudaError" not in message:
                self.errors.append(message)

    return Log()


def capability_of(device: torch.device) -> str:
    """A GPU's compute capability, as in `8.6`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
