"""The verb `export`: from a bundle to verified artefacts in it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from litdeploy.config.formats import FORMATS, Option, file_of, imported, kind_of
from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Precision, Target
from litdeploy.errors import ParityError, SettingsError
from litdeploy.exporter.build import Calibration, CheckFunction, Job, build_artefact
from litdeploy.exporter.evidence import LEAST_IMAGES, Evidence, open_test_data
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.triton_repository import backend_of
from litdeploy.exporter.triton_repository import triton_repository as write_repository
from litdeploy.networks import Network, NetworkName, load
from litdeploy.runtime import open_runner, resolve_device, resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Artefact, Manifest, Parity
from litdeploy.storage.staging import keep, reject, staged, tidy
from litdeploy.tasks import task_of

_IO_PRECISIONS = ("fp32", "fp16", "bf16")


def export(
    bundle: Bundle | str | Path = "deploy",
    *,
    precisions: Sequence[Precision] = ("fp32",),
    io_precision: Precision = "fp32",
    embed_preprocessing: bool = False,
    calibration_images: int = 512,
    triton_repository: str | Path | None = None,
    target: Target | str | None = None,
    data: DataSettings | str | None = None,
    network: NetworkName | None = None,
    progress: Callable[[str], None] | None = None,
    **formats: Any,
) -> Manifest:
    """Export a bundle's student in each format and precision, and verify each file on test images against PyTorch.

    The files are `export/student.onnx`, `student.fp16.onnx`, `student.pt2`, `student.engine`, …, each with a sidecar.
    A file beyond the target's tolerance is kept as `student.onnx.rejected`, and the artefact it would have replaced
    stays. An engine built ahead of time for GPUs elsewhere is not run; `parity` in its details is None.

    Args:
        bundle: a bundle, or its folder.
        precisions: of weights and arithmetic.
        io_precision: of images and logits.
        embed_preprocessing: whether the files take pixels, uint8 (N, H, W, C), and normalize them.
        calibration_images: training images on which magnitudes (fp16, bf16) and ranges (int8) are measured.
        triton_repository: a folder for a model repository of Triton Inference Server with the files of this call.
        target: where the student will run, or that target's name or path; None: `cuda` if CUDA is available, else
            `cpu`.
        data: the dataset, or its source, whose test images are compared; None: the one that the student learned on.
        network: needed if the student's network is the user's code.
        progress: called with a line about what was chosen, or left out.
        **formats: True or False for each format by its key in `FORMATS` (`onnx`, on by default; `aoti`; `trt`), and the
            options of formats by name: of `trt` `compute_capabilities` (default: the target's, or the GPU at hand),
            `version_compatible` and `hardware_compatibility`.

    Returns:
        The manifest, with the artefacts under `onnx`, `onnx-fp16`, `aoti`, `trt`, ….

    Raises:
        BundleError: the bundle is incomplete, another process is working on it, or no space is left.
        NetworkError: the network cannot be exported, or is the user's code and was not named.
        SettingsError: an unknown target, a precision that it lacks, an operator set that does not exist, or nothing to
            export.
        DependencyError: engines were requested, and neither `tensorrt` nor `tensorrt_rtx` can build them.
        DeviceError, RunnerError: the target's device is missing, or a backend does not run on it.
        DataError: the images are unavailable, do not fit this network, or are too few.
        GateError: an engine is not in the precision requested (exit code 3).
        ParityError: an artefact is further from PyTorch than the target's tolerance allows (exit code 3).
    """
    names, options = _chosen(formats)
    say = progress or (lambda line: None)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    bundle.read_complete()
    chosen = resolve_target(target)
    _check_precisions(names, precisions, io_precision, chosen, target)
    device = _device_for(names, chosen)
    resolved = {name: _options_of(name, options, chosen) for name in names}
    for name in names:
        if reference := FORMATS[name].check:
            check: CheckFunction = imported(reference)
            if line := check(chosen, device, resolved[name]):
                say(line)
    with bundle.lock():
        manifest = bundle.read_complete()
        tidy(bundle.export_path)
        student = load(bundle.student_path, network=network)
        opened = open_test_data(manifest, data, student, device)
        evidence = Evidence.of(opened, student, max(LEAST_IMAGES, chosen.batch_sizes[-1]))
        job = Job(
            student,
            chosen,
            device,
            io_precision=io_precision,
            embed_preprocessing=embed_preprocessing,
            calibration=Calibration(opened, student, calibration_images),
        )
        written: list[Artefact] = []
        for name in names:
            for precision in dict.fromkeys(precisions):
                one = replace(job, precision=precision, options=resolved[name])
                one = replace(one, command=_command(bundle, name, one, target))
                manifest = _export_one(bundle, name, one, evidence)
                written.append(manifest.artefacts[kind_of(name, precision)])
        if triton_repository is not None:
            _write_triton(bundle, written, Path(triton_repository), student, job, say)
        return manifest


def _chosen(formats: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The formats to export, and the options given for them.

    Raises:
        SettingsError: no format, an option of a format that was not requested, or a value that it does not have.
        TypeError: neither a format nor an option is called so.
    """
    names = [name for name in FORMATS if formats.get(name, name == "onnx")]
    if not names:
        raise SettingsError(f"nothing to export: pass {' or '.join(f'{name}=True' for name in FORMATS)}.")
    known = {option.name: (name, option) for name, row in FORMATS.items() for option in row.options}
    options = {key: value for key, value in formats.items() if key not in FORMATS}
    for key, value in options.items():
        if key not in known:
            raise TypeError(f"export() has no argument {key!r}: no format and no option of one is called so.")
        name, option = known[key]
        if option.choices and value not in option.choices:
            raise SettingsError(f"{option.flag} {value}: no such value. Write {', '.join(option.choices)}.")
        if name not in names and _given(option, value):
            raise SettingsError(
                f"{option.flag} is for {FORMATS[name].title}, which was not requested. Add --{name}, or leave it out."
            )
    return names, options


def _given(option: Option, value: Any) -> bool:
    """Whether a value is more than the option's default."""
    return bool(value) if isinstance(option.default, tuple) else bool(value != option.default)


def _options_of(name: str, given: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """A format's options, completed by the target and the defaults."""
    found: dict[str, Any] = {}
    for option in FORMATS[name].options:
        value = given.get(option.name, option.default)
        if isinstance(option.default, tuple):
            at_target = getattr(target, option.from_target) if option.from_target else None
            value = tuple(value) or (() if at_target is None else (at_target,))
        found[option.name] = value
    return found


def _check_precisions(
    names: Sequence[str],
    precisions: Sequence[str],
    io_precision: str,
    target: Target,
    given: Target | str | None,
) -> None:
    """Check that each format and the target have each precision.

    Args:
        given: the target as the user gave it.

    Raises:
        SettingsError: one of them lacks one; or there is none to export in.
    """
    known = get_args(Precision)
    if not precisions:
        raise SettingsError("nothing to export: no precision was given. Write --precision fp32.")
    for precision in precisions:
        if precision not in known:
            raise SettingsError(
                f"--precision {precision}: no such precision. Write one or more of {', '.join(known)}, as in "
                "--precision fp32,fp16."
            )
        if precision not in target.precisions:
            gpu = f" (compute capability {target.compute_capability})" if target.compute_capability else ""
            raise SettingsError(
                f"--precision {precision}: the target{f' {given}' if isinstance(given, str) else ''}{gpu} lacks it. "
                f"It has {', '.join(target.precisions)}."
            )
        for name in names:
            if precision not in FORMATS[name].precisions:
                others = [other for other, row in FORMATS.items() if precision in row.precisions]
                raise SettingsError(
                    f"--{name} has no {precision}; it has {', '.join(FORMATS[name].precisions)}. Export {precision} "
                    f"apart: litdeploy export --{others[0]} --precision {precision}"
                )
    if io_precision not in _IO_PRECISIONS:
        raise SettingsError(f"--io-precision {io_precision}: images and logits are {', '.join(_IO_PRECISIONS)}.")


def _device_for(names: Sequence[str], target: Target) -> torch.device:
    """Where the files are built and run; the CPU if there is no GPU and all of them can be built ahead of time.

    Raises:
        DeviceError: the target's device is missing.
    """
    if all(FORMATS[name].ahead_of_time for name in names) and not torch.cuda.is_available():
        return torch.device("cpu")
    return resolve_device(target.device)


def _export_one(bundle: Bundle, name: str, job: Job, evidence: Evidence) -> Manifest:
    """Build, verify and enter one file."""
    path = bundle.export_path / file_of(name, job.precision)
    with staged(path) as candidate:
        artefact = build_artefact(name, job, candidate, path.relative_to(bundle.path).as_posix())
        parity = _parity(name, job, candidate, evidence) if artefact.runs_here else None
        details = {**artefact.details, "parity": parity and parity.model_dump(mode="json")}
        artefact = artefact.model_copy(update={"details": details})
        if parity is not None and not parity.within:
            raise beyond_tolerance(path, reject(candidate, path, artefact), parity)
        # Before the file is another one: a manifest never names one that is missing.
        bundle.drop_artefact(kind_of(name, job.precision))
        keep(candidate, path, artefact)
    return bundle.add_artefact(kind_of(name, job.precision), artefact)


def _parity(name: str, job: Job, path: Path, evidence: Evidence) -> Parity:
    with (
        open_runner("eager", network=job.network, device=job.device) as reference,
        open_runner(
            FORMATS[name].runner, path=path, device=job.device, memory_limit=job.target.memory_limit
        ) as candidate,
    ):
        tolerance = getattr(job.target.tolerance, job.precision)
        sizes = sorted(set(job.target.batch_profile))
        taken = evidence.in_calls(sizes[0], sizes[-1])
        spec = job.network.spec
        return compare_runners(reference, candidate, taken.inputs, sizes, tolerance, spec.input, taken.labels_N)


def _write_triton(
    bundle: Bundle,
    artefacts: Sequence[Artefact],
    folder: Path,
    student: Network,
    job: Job,
    say: Callable[[str], None],
) -> None:
    """Write a model repository of the files that Triton serves."""
    served = []
    for artefact in artefacts:
        path = bundle.artefact_path(artefact)
        backend = backend_of(path)
        refusal = f"Triton has no backend for {path.suffix}" if backend is None else backend.refusal(artefact.details)
        if refusal:
            say(f"{artefact.path}: left out of {folder}. {refusal}")
        else:
            served.append((path, artefact))
    models = write_repository(
        served,
        folder,
        classes=task_of(student.spec).output_labels(student.spec),
        batch_sizes=job.target.batch_sizes,
        device=cast("Literal['cpu', 'cuda']", job.device.type),
    )
    for model in models:
        say(f"{model}: a model for tritonserver --model-repository {folder}")


def beyond_tolerance(path: Path, kept: Path, parity: Parity) -> ParityError:
    """The error of an artefact that does not compute what the student computes."""
    return ParityError(
        f"{path.name} does not compute what the student computes:\n{parity.summary()}\n"
        f"The file is kept as {kept}. Find the layer that differs: litdeploy verify {path.parent.parent} --bisect. "
        "If the difference does not matter to you, raise `tolerance` in your own target: litdeploy export "
        "--target my-target.yaml"
    )


def _command(bundle: Bundle, name: str, job: Job, target: Target | str | None) -> str:
    """What to type for one artefact; a target made in Python has no name to type."""
    words = ["litdeploy", "export", *([] if bundle.path == DEFAULT_PATH else [str(bundle.path)]), f"--{name}"]
    words += ["--precision", job.precision]
    if job.io_precision != "fp32":
        words += ["--io-precision", job.io_precision]
    if job.embed_preprocessing:
        words += ["--embed-preprocessing"]
    for option in FORMATS[name].options:
        words += option.words(job.options[option.name])
    if isinstance(target, str):
        words += ["--target", target]
    return shlex.join(words)
