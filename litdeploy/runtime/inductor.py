"""AOTInductor: the network compiled ahead of time into one `.pt2`, which torch alone loads and runs."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from litdeploy.config.spec import InputTensor, input_of
from litdeploy.errors import RunnerError
from litdeploy.files import is_file, sha256_of
from litdeploy.networks.batch import Batch, forward
from litdeploy.runtime.device import device_name, ieee_float32
from litdeploy.runtime.feed import Feed, read_feed
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open
from litdeploy.storage.bundle import read_sidecar, sidecar_of
from litdeploy.storage.records import Artefact

# Of torch.cpu.get_capabilities(): what the compiler may have used (`-march=native`).
_PROCESSOR_FEATURES = ("avx", "avx2", "avx512", "amx", "fma", "f16c", "bmi", "neon", "sve", "sse", "vsx")


class PackageDetails(BaseModel):
    """What a sidecar must say of a package for it to be opened; it says more.

    Attributes:
        image_shape: (channels, height, width), where it takes images.
        built_for: see `built_for`.
    """

    model_config = ConfigDict(strict=True)

    metadata: dict[str, str]
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] | None = None
    classes: int
    built_for: dict[str, str | list[str]]

    @model_validator(mode="after")
    def _tells_its_input(self) -> PackageDetails:
        if self.image_shape is None and input_of(self.metadata) is None:
            raise ValueError("neither an image's shape nor another input is told")
        return self


class InductorRunner:
    """A package as `litdeploy export --aoti` writes it, with its sidecar `NAME.pt2.json`.

    A package is code: it is opened only when its SHA-256 is the sidecar's, and when it was built for this version of
    torch and this kind of processor or GPU.
    """

    name = "inductor"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._path = source.needed_package_path(self.name)
        check_precision(self.name, precision, ("fp32", "fp16", "bf16"))
        self._model: Any = None
        self._feed = Feed()
        self._inputs: tuple[InputTensor, ...] = ()
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        details = package_details(self._path, self.device)
        self._feed = read_feed(details["metadata"], str(self._path))
        self._inputs = inputs_of(details)
        started = time.perf_counter()
        self._model = _load(self._path, self.device)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None

    def run(self, batch: Batch) -> Tensor:
        """See `Runner.run`."""
        if self._model is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._inputs, self.device)
        try:
            with torch.inference_mode(), ieee_float32(self.device):
                logits: Tensor = forward(self._model, self._feed.take(batch))
        except RuntimeError as error:
            raise RunnerError(f"{self._path}: AOTInductor cannot run it: {str(error).splitlines()[0]}") from error
        return logits.float()

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._feed.precision,
            mode="AOTInductor",
            versions={"torch": str(torch.__version__)},
            build_seconds=self._build_seconds,
        )


def built_for(device: torch.device) -> dict[str, Any]:
    """What a package that is compiled here depends on: device, machine, and the GPU's or the processor's abilities."""
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
    # Not in every torch that litdeploy takes.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return sorted(name for name, has in capabilities.items() if has is True and name.startswith(_PROCESSOR_FEATURES))


def read_package(path: Path) -> Artefact:
    """What a package's sidecar says of it, once the file was held against its hash. Nothing of it is run.

    Raises:
        RunnerError: no such file or sidecar, or an altered file.
    """
    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Make it: litdeploy export --aoti")
    sidecar = sidecar_of(path)
    try:
        artefact = read_sidecar(path)
        found = sha256_of(path)
    except (OSError, ValidationError):
        raise RunnerError(
            f"{sidecar}: missing, or not written by `litdeploy export`. {path.name} holds code, which runs only when "
            "its sidecar vouches for it. Copy both files, or make them again: litdeploy export --aoti"
        ) from None
    if found != artefact.sha256:
        raise RunnerError(
            f"{path}: is not the file that was exported (SHA-256 {found[:12]}…, its sidecar says "
            f"{artefact.sha256[:12]}…): altered or truncated. It holds code and is not opened. Make it again: "
            f"{_command(artefact)}"
        )
    return artefact


def package_details(path: Path, device: torch.device) -> dict[str, Any]:
    """What `export_aoti` told of a package, and more, once it was held against this machine.

    Raises:
        RunnerError: as `read_package`; or it was built for something else.
    """
    artefact = read_package(path)
    try:
        PackageDetails.model_validate(artefact.details)
    except ValidationError as error:
        first = error.errors()[0]
        raise RunnerError(
            f"{sidecar_of(path)}: not the sidecar of a package ({'.'.join(map(str, first['loc']))}: {first['msg']}). "
            "Make both again: litdeploy export --aoti"
        ) from None
    differences = _differences(artefact, device)
    if differences:
        raise RunnerError(
            f"{path}: built for something else than is here: {'; '.join(differences)}. Build it here: "
            f"{_command(artefact)}"
        )
    return artefact.details


def inputs_of(details: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    """What a package takes, by its sidecar's details."""
    spec = input_of(details["metadata"])
    return (InputTensor("images", "float32", tuple(details["image_shape"])),) if spec is None else spec.tensors


def _command(artefact: Artefact) -> str:
    return artefact.command or "litdeploy export --aoti"


def _differences(artefact: Artefact, device: torch.device) -> list[str]:
    built, here = artefact.details["built_for"], built_for(device)
    pairs = {"torch": (artefact.versions.get("torch"), str(torch.__version__))} | {
        key: (built.get(key), here.get(key)) for key in ("device", "machine", "compute_capability")
    }
    told = [f"{key.replace('_', ' ')} {there}, here {now}" for key, (there, now) in pairs.items() if there != now]
    lacking = sorted(set(built.get("features", ())) - set(here.get("features", ())))
    if lacking and built.get("device") == here["device"] and built.get("machine") == here["machine"]:
        told.append(f"a processor with {', '.join(lacking)}, which this one lacks")
    return told


def _load(path: Path, device: torch.device) -> Any:
    with warnings.catch_warnings():
        # Inductor loads it, and its classes still use what is deprecated (torch 2.11 to 2.13).
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is ", DeprecationWarning)
        try:
            return torch._inductor.aoti_load_package(str(path), device_index=device.index if device.index else -1)
        except RuntimeError as error:
            raise RunnerError(
                f"{path}: torch {torch.__version__} cannot load it ({str(error).splitlines()[0]}). Make it again: "
                "litdeploy export --aoti"
            ) from error
