"""TensorRT: an ONNX file as an engine, by `tensorrt` (10 and 11) or `tensorrt_rtx`, which share their interface.

`tensorrt` builds on the GPU that will run the engine; `tensorrt_rtx` builds ahead of time, for GPUs elsewhere. Networks
are always strongly typed: the precision is the ONNX file's, and the library keeps to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from litdeploy.config.target import Target
from litdeploy.errors import BundleError, DependencyError, RunnerError, SettingsError
from litdeploy.exporter.build import Built, Job
from litdeploy.exporter.formats.onnx import write_onnx
from litdeploy.exporter.precision import check_precision_share, engine_precisions, network_precisions
from litdeploy.exporter.triton_repository import Signature, Tensor, TritonBackend
from litdeploy.files import sha256_of, write_whole
from litdeploy.runtime.engine import (
    INSTALL,
    BatchProfile,
    EngineDetails,
    HardwareCompatibility,
    Library,
    Precisions,
    capability_of,
    load_library,
    logger_of,
)
from litdeploy.runtime.onnx_file import describe_onnx
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact

_IO_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Attributes:
        precision: `fp32`, `fp16`, `bf16` or `int8`: what the ONNX file must be in for the most part.
        batches: the batch sizes that the engine takes.
        memory_limit: bytes of device memory that a layer may use for scratch; None: no limit.
        version_compatible: whether later versions of the library with the same major number may load it.
        hardware_compatibility: whether GPUs of other kinds may: `none`, `ampere-plus`, `same-compute-capability`.
        timing_cache_dir: where timings are kept; None: `~/.cache/litdeploy/tensorrt`.
        command: what the user typed, which messages about this engine repeat.
    """

    precision: str
    batches: BatchProfile
    memory_limit: int | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    timing_cache_dir: Path | None = None
    command: str = "litdeploy export --trt"


def build(job: Job, path: Path) -> Built:
    """Build an engine, from an ONNX file that is thrown away."""
    choice = choose_library(job.device, job.options["compute_capabilities"])
    limit = job.target.memory_limit
    options = EngineOptions(
        job.precision,
        BatchProfile.of(job.target.batch_sizes),
        memory_limit=None if limit is None else int(limit * 2**30),
        version_compatible=job.options["version_compatible"],
        hardware_compatibility=job.options["hardware_compatibility"],
        command=job.command,
    )
    with TemporaryDirectory(dir=path.parent) as folder:
        onnx_path = Path(folder) / f"{path.stem}.onnx"
        details = write_onnx(job, onnx_path, Path(folder) / "fp32.onnx")
        built = build_engine(onnx_path, path, choice, options)
    # Details are the engine's, and those of the ONNX file that an engine lacks.
    return Built({**details, **built.details, "chosen": choice.summary()}, built.versions)


def check(target: Target, device: torch.device, options: Mapping[str, Any]) -> str:
    """Return which library builds, for which GPUs, and why.

    Raises:
        DependencyError, SettingsError: see `choose_library`.
    """
    return choose_library(device, options["compute_capabilities"]).summary()


def identity(device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine depends on."""
    return {"chosen": choose_library(device, options["compute_capabilities"]).summary()}


def build_engine(onnx_path: Path, path: Path, choice: Builder, options: EngineOptions) -> Artefact:
    """Build an engine and write it, with its sidecar `NAME.json`.

    Args:
        onnx_path: a file whose first input is a batch of images, and whose others have fixed sizes too.
        path: of the engine; its folder is created.
        choice: see `choose_library`.

    Returns:
        The sidecar; its `path` is the bare file name. Its details are an `EngineDetails`.

    Raises:
        RunnerError: no ONNX file, or one that the library does not take; the message has all that it reports.
        SettingsError: batches that the file lacks, or a compatibility that the library lacks.
        GateError: the file is not in the precision requested.
        BundleError: the engine cannot be written.
    """
    described = describe_onnx(onnx_path)
    _check_inputs(onnx_path, described["inputs"], options.batches)
    trt, log = load_library(choice.library), logger_of(choice.library)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, onnx_path, choice, options.precision)
    precisions = network_precisions(network, onnx_path)
    check_precision_share(options.precision, precisions, onnx_path)

    config = _config(trt, builder, network, choice, options)
    with _timing_cache(config, choice, options) as reused:
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _refused(onnx_path, choice, "does not build it", log.errors, options.precision)
    if choice.gpu is not None:
        precisions = _inspected(trt, plan, list(described["inputs"]), options, precisions, choice, onnx_path)
        check_precision_share(options.precision, precisions, onnx_path)
    details = EngineDetails(
        library=choice.library,
        gpu=choice.gpu,
        compute_capabilities=choice.compute_capabilities,
        version_compatible=options.version_compatible,
        hardware_compatibility=options.hardware_compatibility,
        batches=options.batches,
        **{key: described[key] for key in ("input", "output", "inputs", "outputs", "input_shape", "output_shape")},
        metadata=described["metadata"],
        input_type=_io_type(network.get_input(0)),
        output_type=_io_type(network.get_output(0)),
        output_types={
            each.name: _io_type(each) for each in (network.get_output(place) for place in range(network.num_outputs))
        },
        onnx_sha256=sha256_of(onnx_path),
        command=options.command,
        memory_limit=options.memory_limit,
        timing_cache=reused,
        precisions=precisions,
        bytes=plan.nbytes,
    )
    return _written(path, memoryview(plan), details, choice, options.precision)


def _check_inputs(onnx_path: Path, inputs: dict[str, list[int | str]], batches: BatchProfile) -> None:
    shape = next(iter(inputs.values()))
    fixed = all(isinstance(size, int) for each in inputs.values() for size in each[1:])
    if len(shape) != 4 or not fixed:
        found = " and ".join(f"{name} {sizes}" for name, sizes in inputs.items())
        raise RunnerError(
            f"{onnx_path}: takes {found}; images of one size, in batches, are needed. Make one: "
            "litdeploy export --onnx. Networks with other inputs run in onnxruntime on a GPU: leave --trt out"
        )
    if isinstance(shape[0], int) and {batches.min, batches.opt, batches.max} != {shape[0]}:
        raise SettingsError(
            f"{onnx_path}: takes batches of {shape[0]} only, and an engine for {batches.min} to {batches.max} was "
            f"requested. Set the target's `batch_sizes` to [{shape[0]}], or export a file for any batch: "
            "litdeploy export --onnx"
        )


def _io_type(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return _IO_TYPES.get(name, name.lower())


def _parse(trt: Any, network: Any, onnx_path: Path, choice: Builder, precision: str) -> None:
    parser = trt.OnnxParser(network, logger_of(choice.library))
    if parser.parse_from_file(str(onnx_path)):
        return
    errors = []
    for error in (parser.get_error(index) for index in range(parser.num_errors)):
        lines = [line for line in error.desc().splitlines() if "::catchCudaError" not in line]
        where = f"{error.node_operator()} '{error.node_name()}': " if error.node_operator() else ""
        errors.append(where + "\n    ".join(lines))
    raise _refused(onnx_path, choice, "does not take it", errors, precision)


def _refused(onnx_path: Path, choice: Builder, what: str, errors: Sequence[str], precision: str) -> RunnerError:
    reasons = "\n".join(f"  {error}" for error in errors) or "  (no reason given)"
    advice = "Export the file again (litdeploy export --onnx), or leave --trt out."
    if precision == "int8":
        advice = (
            "TensorRT takes quantized files whose biases stay in floating point and whose quantized weights "
            "go straight to their DequantizeLinear: litdeploy export --onnx --precision int8"
        )
    return RunnerError(f"{onnx_path}: {choice.library} {choice.version} {what}:\n{reasons}\n{advice}")


def _config(trt: Any, builder: Any, network: Any, choice: Builder, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector has names and no types
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means the same as in every other runner
    if options.memory_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.memory_limit)
    profile = builder.create_optimization_profile()
    sizes = options.batches
    for taken in (network.get_input(index) for index in range(network.num_inputs)):
        profile.set_shape(taken.name, *((size, *taken.shape[1:]) for size in (sizes.min, sizes.opt, sizes.max)))
    config.add_optimization_profile(profile)
    if choice.library == "tensorrt_rtx":
        _set_capabilities(config, choice, options)
        return config
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper().replace("-", "_"), None)
        if level is None:
            raise SettingsError(
                f"--hardware-compatibility {options.hardware_compatibility}: tensorrt {choice.version} does not have "
                "it. Leave it out, or install a newer one: " + INSTALL["tensorrt"]
            )
        config.hardware_compatibility_level = level
    return config


def _set_capabilities(config: Any, choice: Builder, options: EngineOptions) -> None:
    if options.version_compatible:
        raise SettingsError(
            "--version-compatible: tensorrt_rtx does not have it. Leave it out, and build again after an update."
        )
    if options.hardware_compatibility != "none":
        raise SettingsError(
            f"--hardware-compatibility {options.hardware_compatibility}: tensorrt_rtx does not have it; its engines "
            "run on the GPUs that are named: --compute-capability 8.6,8.9,12.0"
        )
    known = rtx_capabilities()
    config.num_compute_capabilities = len(choice.compute_capabilities)
    for index, each in enumerate(choice.compute_capabilities):
        config.set_compute_capability(known[each], index)


@contextlib.contextmanager
def _timing_cache(config: Any, choice: Builder, options: EngineOptions) -> Iterator[bool | None]:
    """Let the builder use the timings of earlier builds, and keep those of this one.

    Yields whether there were any; None for tensorrt_rtx, which times nothing when it builds.
    """
    if choice.library == "tensorrt_rtx":
        yield None
        return
    folder = options.timing_cache_dir or _cache_dir()
    name = f"{choice.gpu} sm{choice.compute_capabilities[0]} {choice.library} {choice.version}"
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.timing"
    content = path.read_bytes() if path.is_file() else b""
    kept = config.create_timing_cache(content) if content else None
    reused = kept is not None and bool(config.set_timing_cache(kept, False))
    if not reused:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield reused
    # A build without a cache is slower, and as good.
    with contextlib.suppress(OSError, BundleError), write_whole(path) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litdeploy" / "tensorrt"


def _inspected(
    trt: Any,
    plan: Any,
    inputs: Sequence[str],
    options: EngineOptions,
    required: Precisions,
    choice: Builder,
    onnx_path: Path,
) -> Precisions:
    """Types in the built engine, at the batch size that it is tuned for."""
    log = logger_of(choice.library)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = options.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if engine is None or context is None:
        raise _refused(onnx_path, choice, "built an engine that it does not load", log.errors, options.precision)
    for name in inputs:
        context.set_input_shape(name, (options.batches.opt, *engine.get_tensor_shape(name)[1:]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return engine_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON), required)


def _written(path: Path, content: memoryview, details: EngineDetails, choice: Builder, precision: str) -> Artefact:
    artefact = Artefact(
        path=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        precision=precision,
        versions=versions(choice),
        details=details.model_dump(mode="json"),
    )
    sidecar = artefact.model_dump_json(indent=2) + "\n"
    try:
        for name, part in ((path, content), (sidecar_of(path), sidecar.encode())):
            with write_whole(name) as temporary:
                temporary.write_bytes(part)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); {len(content):,} bytes are needed. Make room, or write "
            "elsewhere."
        ) from None
    return artefact


@dataclass(frozen=True)
class Builder:
    """Which library builds, for which GPUs, and why that one.

    Attributes:
        gpu: name of the GPU at hand that it builds for; None if it builds for GPUs elsewhere.
    """

    library: Library
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    reason: str

    def summary(self) -> str:
        """One line: `tensorrt_rtx 1.7.1 for compute capability 8.6, 8.9: there is no CUDA GPU here …`."""
        capabilities = ", ".join(self.compute_capabilities)
        return f"{self.library} {self.version} for compute capability {capabilities}: {self.reason}"


def choose_library(device: torch.device, compute_capabilities: Sequence[str] = ()) -> Builder:
    """Choose `tensorrt` if its GPU and the library are here; else `tensorrt_rtx`, which builds for GPUs elsewhere.

    Args:
        device: where the student will run, if that is this machine.
        compute_capabilities: those requested, as in `8.6`; none: the device's.

    Raises:
        DependencyError: the library needed is not installed; the message says what to install.
        SettingsError: no compute capability to build for, or one that the library does not have.
    """
    here = capability_of(device) if device.type == "cuda" else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    requested = tuple(dict.fromkeys(compute_capabilities)) or ((here,) if here else ())
    version, missing = _version("tensorrt")
    if here is None:
        reason = "there is no CUDA GPU here, and tensorrt builds only on the GPU that runs the engine"
    elif requested != (here,):
        reason = f"tensorrt builds only for the GPU at hand, of compute capability {here}"
    elif version is not None:
        return Builder("tensorrt", version, requested, gpu, f"the library and a GPU ({gpu}) are here")
    else:
        reason = "tensorrt is not installed"
    rtx_version, rtx_missing = _version("tensorrt_rtx")
    if rtx_version is None:
        needed = f"Install one: {INSTALL['tensorrt_rtx']}" if here is None or version is not None else missing
        raise DependencyError(f"{reason}, and tensorrt_rtx is unavailable too: {rtx_missing}\n{needed}")
    if not requested:
        raise SettingsError(
            f"{reason}; tensorrt_rtx {rtx_version} builds ahead of time, for GPUs that are named. Name them: "
            "litdeploy export --trt --compute-capability 8.6,8.9,12.0"
        )
    _check_capabilities(requested, rtx_version)
    return Builder("tensorrt_rtx", rtx_version, requested, gpu if requested == (here,) else None, reason)


def _version(name: Library) -> tuple[str | None, str]:
    """Version of an installed library; or None, and why it is unavailable."""
    try:
        return str(load_library(name).__version__), ""
    except DependencyError as error:
        return None, str(error)


def _check_capabilities(requested: Sequence[str], version: str) -> None:
    known = rtx_capabilities()
    for each in requested:
        if each not in known:
            raise SettingsError(
                f"--compute-capability {each}: tensorrt_rtx {version} does not build for it; it builds for "
                f"{', '.join(known)}. For other GPUs (H200 is 9.0) there is tensorrt, on the GPU itself: "
                f"{INSTALL['tensorrt']}"
            )


def rtx_capabilities() -> dict[str, Any]:
    """Compute capability → tensorrt_rtx's own name of it, for all that it builds for.

    Raises:
        DependencyError: it is not installed.
    """
    members = load_library("tensorrt_rtx").ComputeCapability.__members__
    named = {re.fullmatch(r"SM(\d+)(\d)", name): value for name, value in members.items()}
    return {f"{match[1]}.{match[2]}": value for match, value in named.items() if match}


def versions(choice: Builder) -> dict[str, str]:
    """Versions of the library, of CUDA as the library was built for, and, if there is a GPU, of its driver."""
    found: dict[str, str] = {choice.library: choice.version}
    try:
        needs = " ".join(requires(choice.library) or ())
    except PackageNotFoundError:  # as in NVIDIA's containers, which hold it without pip
        needs = ""
    if built_for := re.search(r"[_-]cu(\d+)\b", needs):
        found["cuda"] = built_for[1]
    elif torch.version.cuda:
        found["cuda"] = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version")
    if (
        choice.gpu is not None
        and driver.is_file()
        and (number := re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text()))
    ):
        found["driver"] = number[0]
    return found


def _signature(path: Path, details: dict[str, Any]) -> Signature:
    source = Tensor(details["input"], details["input_type"], tuple(details["input_shape"]))
    shapes = details.get("outputs") or {details["output"]: details["output_shape"]}
    types = details.get("output_types") or {details["output"]: details["output_type"]}
    return [source], [Tensor(name, types[name], tuple(shape)) for name, shape in shapes.items()]


def _refusal(details: dict[str, Any]) -> str | None:
    if details.get("library") != "tensorrt_rtx":
        return None
    return (
        "Triton's TensorRT backend loads engines of tensorrt, and this one is tensorrt_rtx's. Build one with tensorrt, "
        "on the server's GPU (litdeploy export --trt), or serve the ONNX file."
    )


TRITON = TritonBackend(
    "tensorrt", "tensorrt_plan", "model.plan", "tensorrt", _signature, refusal=_refusal, needs_gpu=True
)
