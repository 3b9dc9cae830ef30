"""The formats that a student is exported in: one row of `FORMATS` each.

Every layer reads this table: the command line for its flags, the target for the names of runners, the exporter for what
builds a file, the runtime for what opens it. Code is named as `module:name` and imported when it is used, so that
reading the table costs nothing: `litdeploy export --help` imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError


@dataclass(frozen=True)
class Option:
    """An option of one format: a keyword of `export` and a flag of `litdeploy export`.

    Attributes:
        name: the keyword.
        flag: on the command line.
        default: its type decides how the flag is read: False is a switch, () a list separated by commas, else text.
        choices: values that a text may have; empty: any.
        metavar: stands for the value in the help; None for a switch.
        from_target: field of `Target` that replaces an empty list.
    """

    name: str
    flag: str
    help: str
    default: bool | str | tuple[str, ...]
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    from_target: str | None = None

    def words(self, value: Any) -> list[str]:
        """What to type for a value; nothing for the default."""
        if value == self.default:
            return []
        if isinstance(self.default, bool):
            return [self.flag]
        return [self.flag, ",".join(value) if isinstance(self.default, tuple) else str(value)]


@dataclass(frozen=True)
class Format:
    """One exported form of a network.

    Attributes:
        title: for people.
        help: of the flag that asks for it.
        suffix: of its files.
        precisions: of weights and arithmetic that it has.
        libraries: modules whose versions a file's sidecar records.
        build: `exporter.build.BuildFunction`, which writes a file.
        runners: name → a function of (source, device, precision) that returns a `Runner` of its files. The first
            verifies them.
        describe: `runtime.runner.DescribeFunction`, which reads what a file says of itself, so that it can be evaluated
            alone; None: it cannot.
        check: `exporter.build.CheckFunction`, called before anything is built; None: nothing to check.
        identity: `exporter.build.IdentityFunction`, which returns the details of a file that depend on the machine;
            None: it depends on nothing here.
        alike: settings of a target in which a teacher's file must equal the student's, for a fair comparison: `opset`,
            `batch_sizes`, `memory_limit`.
        ahead_of_time: whether it can be built where the target's device is missing.
        options: its own.
        triton: `exporter.triton_repository.TritonBackend` for its files; None: Triton has none.
    """

    title: str
    help: str
    suffix: str
    precisions: tuple[str, ...]
    libraries: tuple[str, ...]
    build: str
    runners: Mapping[str, str]
    describe: str | None = None
    check: str | None = None
    identity: str | None = None
    alike: tuple[str, ...] = ()
    ahead_of_time: bool = False
    options: tuple[Option, ...] = ()
    triton: str | None = None

    @property
    def runner(self) -> str:
        """The runner that verifies its files."""
        return next(iter(self.runners))

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write a file."""
        return {name: str(import_module(name).__version__) for name in self.libraries}

    def defaults(self) -> dict[str, Any]:
        """Name → default of its options."""
        return {option.name: option.default for option in self.options}


FORMATS: dict[str, Format] = {
    "onnx": Format(
        title="ONNX",
        help="Write ONNX: student.onnx, student.fp16.onnx, …",
        suffix=".onnx",
        precisions=("fp32", "fp16", "bf16", "int8"),
        libraries=("torch", "onnx", "onnxruntime", "onnxscript"),
        build="litdeploy.exporter.formats.onnx:build",
        runners={
            "onnxruntime": "litdeploy.runtime.onnxruntime:OnnxRuntimeRunner",
            "onnxruntime-graph": "litdeploy.runtime.onnxruntime:graph_runner",
        },
        describe="litdeploy.runtime.onnx_file:describe",
        alike=("opset",),
        triton="litdeploy.exporter.formats.onnx:TRITON",
    ),
    "aoti": Format(
        title="AOTInductor",
        help="Write an AOTInductor package (student.pt2) for this machine's processor or GPU.",
        suffix=".pt2",
        precisions=("fp32", "fp16", "bf16"),
        libraries=("torch",),
        build="litdeploy.exporter.formats.inductor:build",
        runners={"inductor": "litdeploy.runtime.inductor:InductorRunner"},
        describe="litdeploy.runtime.inductor:describe",
        check="litdeploy.exporter.formats.inductor:check",
        identity="litdeploy.exporter.formats.inductor:identity",
        triton="litdeploy.exporter.formats.inductor:TRITON",
    ),
    "trt": Format(
        title="TensorRT",
        help="Build a TensorRT engine (student.engine); without a GPU, ahead of time for other machines.",
        suffix=".engine",
        precisions=("fp32", "fp16", "bf16", "int8"),
        libraries=("torch", "onnx", "onnxscript"),
        build="litdeploy.exporter.formats.tensorrt:build",
        runners={
            "tensorrt": "litdeploy.runtime.tensorrt:TensorRTRunner",
            "tensorrt-graph": "litdeploy.runtime.tensorrt:graph_runner",
        },
        check="litdeploy.exporter.formats.tensorrt:check",
        identity="litdeploy.exporter.formats.tensorrt:identity",
        alike=("opset", "batch_sizes", "memory_limit"),
        ahead_of_time=True,
        options=(
            Option(
                "compute_capabilities",
                "--compute-capability",
                "Compute capabilities of the GPUs to build for, as in 8.6,8.9,12.0. Default: the target's.",
                (),
                metavar="N.N,…",
                from_target="compute_capability",
            ),
            Option(
                "version_compatible",
                "--version-compatible",
                "Build engines that later versions with the same major number load too.",
                False,
            ),
            Option(
                "hardware_compatibility",
                "--hardware-compatibility",
                "Build engines for other GPUs than the one that builds. Default: none.",
                "none",
                choices=("none", "ampere-plus", "same-compute-capability"),
                metavar="none|ampere-plus|same-compute-capability",
            ),
        ),
        triton="litdeploy.exporter.formats.tensorrt:TRITON",
    ),
}

# Runners that take the module itself and no exported file.
MODULE_RUNNERS: dict[str, str] = {
    "eager": "litdeploy.runtime.eager:EagerRunner",
    "compiled": "litdeploy.runtime.compiled:CompiledRunner",
}


def runners() -> dict[str, str]:
    """Name → where it is defined, of every runner."""
    return {**MODULE_RUNNERS, **{name: at for each in FORMATS.values() for name, at in each.runners.items()}}


def format_of_runner(runner: str) -> str | None:
    """The key of the format that a runner opens; None if it takes the module."""
    return next((name for name, each in FORMATS.items() if runner in each.runners), None)


def format_of(kind: str) -> str:
    """The key of an artefact's format, by the artefact's key in the manifest: `onnx-fp16` → `onnx`.

    Raises:
        BundleError: there is no such format.
    """
    name = kind.split("-")[0]
    if name not in FORMATS:
        raise BundleError(f"the manifest holds the artefact {kind!r}; known formats: {', '.join(FORMATS)}.")
    return name


def format_of_file(path: Path) -> str | None:
    """The key of the format of an exported file that describes itself, by its suffix; None: `path` is not one."""
    return next((name for name, row in FORMATS.items() if row.describe and row.suffix == path.suffix), None)


def described_suffixes() -> str:
    """Suffixes of the files that describe themselves, for people: `.onnx, .pt2`."""
    return ", ".join(row.suffix for row in FORMATS.values() if row.describe)


def kind_of(name: str, precision: str) -> str:
    """An artefact's key in the manifest: `onnx`, `onnx-fp16`, `aoti`."""
    return name if precision == "fp32" else f"{name}-{precision}"


def file_of(name: str, precision: str, role: str = "student") -> str:
    """An artefact's file name: `student.onnx`, `student.fp16.onnx`, `network.pt2`."""
    return f"{role}{'' if precision == 'fp32' else f'.{precision}'}{FORMATS[name].suffix}"


def imported(reference: str) -> Any:
    """What `module:name` refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
