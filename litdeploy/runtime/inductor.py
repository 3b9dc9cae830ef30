"""The runner `inductor`: an AOTInductor package (`.pt2`), compiled ahead of time, which torch alone loads and runs."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from litdeploy.batch import Batch, forward
from litdeploy.config.spec import InputTensor, input_of
from litdeploy.errors import RunnerError, first_line
from litdeploy.files import is_file, sha256_of
from litdeploy.runtime.adapter import InputAdapter, answer, read_adapter, read_task
from litdeploy.runtime.device import device_name, ieee_float32
from litdeploy.runtime.runner import Description, ExportedFile, Source, check_batch, check_precision, not_open
from litdeploy.storage.bundle import read_sidecar, sidecar_of
from litdeploy.storage.records import Artefact
from litdeploy.tasks import task_of

# Of torch.cpu.get_capabilities(): features that the compiler may have used (`-march=native`).
_PROCESSOR_FEATURES = ("avx", "avx2", "avx512", "amx", "fma", "f16c", "bmi", "neon", "sve", "sse", "vsx")


class PackageDetails(BaseModel):
    """Details that a package's sidecar must have for the package to be opened, among others.

    Attributes:
        image_shape: (channels, height, width), if it takes images.
        built_for: see `built_for`.
    """

    model_config = ConfigDict(strict=True)

    metadata: dict[str, str]
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] | None = None
    classes: int
    built_for: dict[str, str | list[str]]

    @model_validator(mode="after")
    def _has_input(self) -> PackageDetails:
        if self.image_shape is None and input_of(self.metadata) is None:
            raise ValueError("it has neither an image's shape nor another input")
        return self


class InductorRunner:
    """Runs a package that `litdeploy export --aoti` wrote, with its sidecar `NAME.pt2.json`.

    A package is code: it is opened only if its SHA-256 matches the sidecar and it was built for this version of torch
    and this kind of processor or GPU.
    """

    name = "inductor"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._path = source.needed_path(self.name)
        check_precision(self.name, precision, ("fp32", "fp16", "bf16"))
        self._model: Any = None
        self._adapter = InputAdapter()
        self._inputs: tuple[InputTensor, ...] = ()
        self._task = task_of(None)
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        details = package_details(self._path, self.device)
        self._adapter = read_adapter(details["metadata"], str(self._path))
        self._inputs = inputs_of(details)
        self._task = read_task(details["metadata"], input_of(details["metadata"]), str(self._path))
        started = time.perf_counter()
        self._model = _load(self._path, self.device)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None

    def run(self, batch: Batch) -> Batch:
        """See `Runner.run`."""
        if self._model is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._inputs, self.device)
        try:
            with torch.inference_mode(), ieee_float32(self.device):
                output: Batch = forward(self._model, self._adapter.adapt(batch))
        except RuntimeError as error:
            raise RunnerError(f"{self._path}: AOTInductor cannot run it: {first_line(error)}") from error
        return answer(output if isinstance(output, dict) else {"output": output}, self._task)

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._adapter.precision,
            mode="AOTInductor",
            versions={"torch": str(torch.__version__)},
            build_seconds=self._build_seconds,
        )


def built_for(device: torch.device) -> dict[str, Any]:
    """What a package compiled here depends on: device, machine, and features of the GPU or the processor."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {
            "device": "cuda",
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name(device),
            "compute_capability": f"{major}.{minor}",
        }
    return {"device": device.type, "machine": platform.machine(), "features": _features()}


def _features() -> list[str]:
    # Missing from some supported torch versions.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return sorted(name for name, has in capabilities.items() if has is True and name.startswith(_PROCESSOR_FEATURES))


def read_package(path: Path) -> Artefact:
    """Read a package's sidecar and verify the package against its hash. Nothing in the package is run.

    Raises:
        RunnerError: the file or its sidecar is missing, or the file was altered.
    """
    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Create it: litdeploy export --aoti")
    sidecar = sidecar_of(path)
    try:
        artefact = read_sidecar(path)
        found = sha256_of(path)
    except (OSError, ValidationError):
        raise RunnerError(
            f"{sidecar}: missing, or not written by `litdeploy export`. {path.name} holds code, which runs only if "
            "its sidecar confirms its hash. Copy both files, or create them again: litdeploy export --aoti"
        ) from None
    if found != artefact.sha256:
        raise RunnerError(
            f"{path}: not the file that was exported (SHA-256 {found[:12]}…, its sidecar says "
            f"{artefact.sha256[:12]}…): altered or truncated. It holds code and is not opened. Export it again: "
            f"{_command(artefact)}"
        )
    return artefact


def package_details(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a package's details and check that it was built for this machine.

    Raises:
        RunnerError: as `read_package`, or the package was built for another machine.
    """
    artefact = read_package(path)
    try:
        PackageDetails.model_validate(artefact.details)
    except ValidationError as error:
        first = error.errors()[0]
        raise RunnerError(
            f"{sidecar_of(path)}: not the sidecar of a package ({'.'.join(map(str, first['loc']))}: {first['msg']}). "
            "Export both again: litdeploy export --aoti"
        ) from None
    differences = _differences(artefact, device)
    if differences:
        raise RunnerError(
            f"{path}: built for another machine: {'; '.join(differences)}. Build it here: {_command(artefact)}"
        )
    return artefact.details


def describe(path: Path, device: torch.device) -> ExportedFile:
    """See `DescribeFunction`.

    Raises:
        RunnerError: as `package_details`.
    """
    details = package_details(path, device)
    shape = details.get("image_shape")
    return ExportedFile(details["metadata"], None if shape is None else tuple(shape), details["classes"])


def inputs_of(details: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    """Input tensors of a package, from its sidecar's details."""
    spec = input_of(details["metadata"])
    return (InputTensor("images", "float32", tuple(details["image_shape"])),) if spec is None else spec.tensors


def _command(artefact: Artefact) -> str:
    return artefact.command or "litdeploy export --aoti"


def _differences(artefact: Artefact, device: torch.device) -> list[str]:
    built, here = artefact.details["built_for"], built_for(device)
    pairs = {"torch": (artefact.versions.get("torch"), str(torch.__version__))} | {
        key: (built.get(key), here.get(key)) for key in ("device", "machine", "compute_capability")
    }
    found = [f"{key.replace('_', ' ')} {there}, here {now}" for key, (there, now) in pairs.items() if there != now]
    lacking = sorted(set(built.get("features", ())) - set(here.get("features", ())))
    if lacking and built.get("device") == here["device"] and built.get("machine") == here["machine"]:
        found.append(f"a processor with {', '.join(lacking)}, which this one lacks")
    return found


def _load(path: Path, device: torch.device) -> Any:
    with warnings.catch_warnings():
        # Inductor imports a module whose classes still use a deprecated decorator (torch 2.11 to 2.13).
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is ", DeprecationWarning)
        try:
            return torch._inductor.aoti_load_package(str(path), device_index=device.index if device.index else -1)
        except RuntimeError as error:
            raise RunnerError(
                f"{path}: torch {torch.__version__} cannot load it ({first_line(error)}). Export it again: "
                "litdeploy export --aoti"
            ) from error
