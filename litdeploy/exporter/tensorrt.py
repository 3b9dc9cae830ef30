"""An ONNX file as a TensorRT engine, by `tensorrt` (10 and 11) or `tensorrt_rtx`, which share their interface.

Networks are always strongly typed: the precision is the ONNX file's, and the library keeps to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError, RunnerError, SettingsError
from litdeploy.exporter.engine_precision import check_precision_share, engine_precisions, network_precisions
from litdeploy.exporter.onnx import describe_onnx
from litdeploy.exporter.tensorrt_choice import Choice, rtx_capabilities, versions
from litdeploy.files import sha256_of, write_whole
from litdeploy.runtime.engine import (
    INSTALL,
    BatchProfile,
    EngineDetails,
    HardwareCompatibility,
    Precisions,
    load_library,
    logger_of,
)
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact

_IO_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "UINT8": "uint8"}


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Attributes:
        precision: `fp32`, `fp16`, `bf16` or `int8`: what the ONNX file must be in for the most part.
        batches: the batch sizes that the engine takes.
        memory_limit: bytes of device memory that a layer may use for scratch; None: all that there is.
        version_compatible: whether later versions of the library with the same major number may load it.
        hardware_compatibility: whether GPUs of other kinds may: `none`, `ampere-plus`, `same-compute-capability`.
        timing_cache_dir: where timings are kept; None: `~/.cache/litdeploy/tensorrt`.
        command: what the user typed, which a message about this engine tells to type again.
    """

    precision: str
    batches: BatchProfile
    memory_limit: int | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    timing_cache_dir: Path | None = None
    command: str = "litdeploy export --trt"


def build_engine(onnx_path: Path, path: Path, choice: Choice, options: EngineOptions) -> Artefact:
    """Builds an engine and writes it, with its sidecar `NAME.json` beside it.

    Args:
        onnx_path: a file whose first input is a batch of images, and whose others have fixed sizes too.
        path: of the engine; its folder is made.
        choice: see `choose_library`.

    Returns:
        What the sidecar holds; `path` in it is the bare file name. Its details are an `EngineDetails`.

    Raises:
        RunnerError: no ONNX file, or one that the library does not take; holds all that it says of it.
        SettingsError: batches that the file does not have, or a compatibility that the library does not.
        GateError: the file is not in the precision that was asked for.
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
        **{key: described[key] for key in ("input", "output", "inputs", "input_shape", "output_shape", "metadata")},
        input_type=_io_type(network.get_input(0)),
        output_type=_io_type(network.get_output(0)),
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
        told = " and ".join(f"{name} {sizes}" for name, sizes in inputs.items())
        raise RunnerError(
            f"{onnx_path}: takes {told}; images of one size, in batches, are needed. Make such a file: "
            "litdeploy export --onnx. Networks that take something else run in onnxruntime on a GPU: leave --trt out"
        )
    if isinstance(shape[0], int) and {batches.min, batches.opt, batches.max} != {shape[0]}:
        raise SettingsError(
            f"{onnx_path}: takes batches of {shape[0]} only, and an engine for {batches.min} to {batches.max} was "
            f"asked for. Set the target's `batch_sizes` to [{shape[0]}], or export a file for any batch: "
            "litdeploy export --onnx"
        )


def _io_type(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return _IO_TYPES.get(name, name.lower())


def _parse(trt: Any, network: Any, onnx_path: Path, choice: Choice, precision: str) -> None:
    parser = trt.OnnxParser(network, logger_of(choice.library))
    if parser.parse_from_file(str(onnx_path)):
        return
    errors = []
    for error in (parser.get_error(index) for index in range(parser.num_errors)):
        lines = [line for line in error.desc().splitlines() if "::catchCudaError" not in line]
        where = f"{error.node_operator()} '{error.node_name()}': " if error.node_operator() else ""
        errors.append(where + "\n    ".join(lines))
    raise _refused(onnx_path, choice, "does not take it", errors, precision)


def _refused(onnx_path: Path, choice: Choice, what: str, errors: Sequence[str], precision: str) -> RunnerError:
    told = "\n".join(f"  {error}" for error in errors) or "  (it does not say why)"
    advice = "Export the file again (litdeploy export --onnx), or leave --trt out."
    if precision == "int8":
        advice = (
            "Of quantised files TensorRT takes those whose biases stay in floating point and whose quantised weights "
            "go straight to their DequantizeLinear: litdeploy export --onnx --precision int8"
        )
    return RunnerError(f"{onnx_path}: {choice.library} {choice.version} {what}:\n{told}\n{advice}")


def _config(trt: Any, builder: Any, network: Any, choice: Choice, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector tells names and no types
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


def _set_capabilities(config: Any, choice: Choice, options: EngineOptions) -> None:
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
def _timing_cache(config: Any, choice: Choice, options: EngineOptions) -> Iterator[bool | None]:
    """While it is open, the builder knows the timings of builds before, and then keeps those of this one.

    Gives whether there were any; None for tensorrt_rtx, which times nothing when it builds.
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
    demanded: Precisions,
    choice: Choice,
    onnx_path: Path,
) -> Precisions:
    """The types in the built engine, at the batch size that it is tuned for."""
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
    return engine_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON), demanded)


def _written(path: Path, content: memoryview, details: EngineDetails, choice: Choice, precision: str) -> Artefact:
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
