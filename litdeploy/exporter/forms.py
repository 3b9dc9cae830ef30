"""The forms of export: one row of the table for each, which says how it is written and what runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from litdeploy.batch import Batch, in_parts, moved, size_of
from litdeploy.config.target import Precision, Target
from litdeploy.data import Data, prepared
from litdeploy.errors import BundleError, DataError
from litdeploy.exporter.conversion import Conversion, convert
from litdeploy.exporter.inductor import export_aoti
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.quantize import quantise_onnx
from litdeploy.exporter.tensorrt import EngineOptions, build_engine
from litdeploy.exporter.tensorrt_choice import Choice
from litdeploy.exporter.timing import interleaved_ms
from litdeploy.networks import Network
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.engine import BatchProfile, HardwareCompatibility
from litdeploy.storage.records import Artefact

_MEASURE_AT_ONCE = 64


@dataclass(frozen=True)
class Form:
    """One form of export.

    Attributes:
        suffix: of its files.
        runner: the key of `RUNNERS` that runs them.
        source: the argument by which `open_runner` takes such a file.
        precisions: those that it has.
        libraries: whose versions its sidecar records.
        write: writes a file for a job, in a folder that is there.
    """

    suffix: str
    runner: str
    source: str
    precisions: tuple[Precision, ...]
    libraries: tuple[str, ...]
    write: Callable[[Job, Path], Written]

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that wrote a file."""
        return {name: str(importlib.import_module(name).__version__) for name in self.libraries}

    def open(self, path: Path, device: torch.device, target: Target) -> Runner:
        """The runner of a file of this form, to be entered."""
        sources: dict[str, Any] = {self.source: path}
        return open_runner(self.runner, **sources, device=device, memory_limit=target.memory_limit)


@dataclass(frozen=True)
class Written:
    """What is known of a file that was written.

    Attributes:
        details: what is in it.
        versions: of what wrote it, besides the libraries of its form.
        built_for: compute capabilities of GPUs elsewhere that it runs on; empty where it runs here.
    """

    details: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    built_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How the files are written, beside their precision.

    Attributes:
        io_precision: of inputs in floating point and of logits.
        embed_preprocessing: whether files take pixels, uint8 (N, H, W, C), and normalise them.
        calibration_images: training images on which activations are measured.
        compute_capabilities: of the GPUs that engines are built for, as in `8.6`; none: the one at hand.
        version_compatible, hardware_compatibility: of engines, see `EngineOptions`.
    """

    io_precision: Precision = "fp32"
    embed_preprocessing: bool = False
    calibration_images: int = 512
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"


class Calibration:
    """Training images on which ranges and magnitudes are measured, drawn once and only where a precision needs them.

    Args:
        count: how many; they are the same for every run.
    """

    def __init__(self, data: Data, network: Network, count: int) -> None:
        self._data, self._network, self._count = data, network, count

    @cached_property
    def inputs(self) -> Batch:
        """As the network takes them, on the CPU.

        Raises:
            DataError: there are fewer.
        """
        train = self._data.train
        if len(train) < self._count:
            raise DataError(
                f"{self._data.source}: has {len(train)} training {self._data.noun}s, and {self._count} were asked "
                f"for to calibrate on. Take those that there are: --calibration-images {len(train)}"
            )
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: self._count]
        [picked] = train.pick([rows])
        return moved(prepared(picked.images(), self._network.spec.input, picked.labels_N), torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """One file to write.

    Attributes:
        network: the student, on the CPU.
        device: where it will run, and is compiled for.
        command: what to type to do it again.
        choice: which TensorRT builds; None where no engine is written.
    """

    network: Network
    precision: Precision
    target: Target
    device: torch.device
    options: Options
    calibration: Calibration
    command: str
    choice: Choice | None = None

    def conversion(self) -> Conversion | None:
        """The network in the job's precision; None where that is its own."""
        if self.precision not in ("fp16", "bf16"):
            return None
        return convert(self.network, self.precision, in_parts(self.calibration.inputs, _MEASURE_AT_ONCE))


def _write_onnx(job: Job, path: Path) -> Written:
    """Of an int8 file, also how long it and the float32 file take, where the target's device is this machine's."""
    with TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "fp32.onnx"
        details = _onnx(job, path, source)
        if job.precision == "int8":
            details["latency"] = _latency(job, source, path)
    return Written(details)


def _onnx(job: Job, path: Path, source: Path) -> dict[str, Any]:
    """Writes the network in the job's precision; in int8 from its float32 file, which is left at `source`."""
    conversion = job.conversion()
    details = export_onnx(
        job.network,
        source if job.precision == "int8" else path,
        job.target.opset,
        conversion=conversion,
        io_precision=job.options.io_precision,
        embedded=job.options.embed_preprocessing,
    )
    if job.precision != "int8":
        return {**details, **_told(conversion)}
    inputs = job.calibration.inputs
    return {
        **details,
        **quantise_onnx(source, path, inputs),
        "calibration": {"images": size_of(inputs), "method": "least and largest value"},
    }


def _latency(job: Job, fp32_path: Path, int8_path: Path) -> dict[str, Any]:
    form = FORMS["onnx"]
    with form.open(fp32_path, job.device, job.target) as fp32, form.open(int8_path, job.device, job.target) as int8:
        size = job.target.batch_profile[0]
        batch = moved(job.network.example(size), job.device)
        fp32_ms, int8_ms = interleaved_ms(fp32, int8, batch)
    return {"batch_size": size, "fp32_ms": fp32_ms, "int8_ms": int8_ms}


def _write_aoti(job: Job, path: Path) -> Written:
    conversion = job.conversion()
    details = export_aoti(
        job.network,
        path,
        job.device,
        conversion=conversion,
        io_precision=job.options.io_precision,
        embedded=job.options.embed_preprocessing,
    )
    return Written({**details, **_told(conversion)})


def _write_trt(job: Job, path: Path) -> Written:
    assert job.choice is not None
    limit = job.target.memory_limit
    options = EngineOptions(
        job.precision,
        BatchProfile.of(job.target.batch_sizes),
        memory_limit=None if limit is None else int(limit * 2**30),
        version_compatible=job.options.version_compatible,
        hardware_compatibility=job.options.hardware_compatibility,
        command=job.command,
    )
    with TemporaryDirectory(dir=path.parent) as folder:
        onnx_path = Path(folder) / f"{path.stem}.onnx"
        details = _onnx(job, onnx_path, Path(folder) / "fp32.onnx")
        built = build_engine(onnx_path, path, job.choice, options)
    # Its details are the engine's; of the ONNX file those stay that an engine does not have.
    return Written(
        {**details, **built.details, "chosen": job.choice.told()},
        built.versions,
        built_for=() if job.choice.gpu else job.choice.compute_capabilities,
    )


def _told(conversion: Conversion | None) -> dict[str, Any]:
    if conversion is None:
        return {}
    return {
        "largest_activation": {"value": conversion.largest, "layer": conversion.largest_layer},
        "kept_in_fp32": list(conversion.kept),
    }


FORMS: dict[str, Form] = {
    "onnx": Form(
        ".onnx",
        "onnxruntime",
        "onnx_path",
        ("fp32", "fp16", "bf16", "int8"),
        ("torch", "onnx", "onnxruntime", "onnxscript"),
        _write_onnx,
    ),
    "aoti": Form(".pt2", "inductor", "package_path", ("fp32", "fp16", "bf16"), ("torch",), _write_aoti),
    "trt": Form(
        ".engine",
        "tensorrt",
        "engine_path",
        ("fp32", "fp16", "bf16", "int8"),
        ("torch", "onnx", "onnxscript"),
        _write_trt,
    ),
}


def kind_of(form: str, precision: str) -> str:
    """The manifest's key of an artefact: `onnx`, `onnx-fp16`, `aoti`."""
    return form if precision == "fp32" else f"{form}-{precision}"


def form_of(kind: str) -> Form:
    """The form of an artefact, by its key in the manifest.

    Raises:
        BundleError: there is no such form.
    """
    form = FORMS.get(kind.split("-")[0])
    if form is None:
        raise BundleError(f"the manifest holds the artefact {kind!r}; those that there are: {', '.join(FORMS)}.")
    return form


def runs_here(artefact: Artefact) -> bool:
    """Whether a file can be run on this machine; engines that were built ahead of time for GPUs elsewhere cannot."""
    return "gpu" not in artefact.details or artefact.details["gpu"] is not None


def file_of(form: str, precision: str) -> str:
    """The file name of an artefact: `student.onnx`, `student.fp16.onnx`, `student.pt2`."""
    return f"student{'' if precision == 'fp32' else f'.{precision}'}{FORMS[form].suffix}"
