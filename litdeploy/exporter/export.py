"""The verb `export`: from a bundle's student, or any network, to verified artefacts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from litdeploy.config.formats import FORMATS, Option, file_of, imported, kind_of
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import TaskName
from litdeploy.config.target import Precision, Target
from litdeploy.data import Data, Objects
from litdeploy.errors import ParityError, SettingsError
from litdeploy.exporter.build import Calibration, CheckFunction, Job, build_artefact, check_one_pass
from litdeploy.exporter.evidence import Evidence, open_for, open_test_data, settings_of
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.teacher import read_network
from litdeploy.exporter.triton_repository import backend_of
from litdeploy.exporter.triton_repository import triton_repository as write_repository
from litdeploy.files import is_file
from litdeploy.networks import Network, NetworkName, is_hub, load, published
from litdeploy.networks.hub import write_configuration
from litdeploy.runtime import open_runner, resolve_device, resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.checkpoint import SUFFIXES, read_checkpoint, write_checkpoint
from litdeploy.storage.exports import DEFAULT_EXPORTS, ExportFolder
from litdeploy.storage.records import Artefact, Exports, Manifest, Parity, TeacherRecord
from litdeploy.storage.staging import keep, reject, staged, tidy
from litdeploy.tasks import task_of
from litdeploy.version import __version__

_IO_PRECISIONS = ("fp32", "fp16", "bf16")


def export(
    source: Bundle | Network | nn.Module | str | Path = "deploy",
    *,
    out: str | Path | None = None,
    precisions: Sequence[Precision] = ("fp32",),
    io_precision: Precision = "fp32",
    embed_preprocessing: bool = False,
    calibration_images: int = 512,
    triton_repository: str | Path | None = None,
    target: Target | str | None = None,
    data: Any = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
    progress: Callable[[str], None] | None = None,
    **formats: Any,
) -> Manifest | Exports:
    """Export a student or any network in each format and precision, and verify each file against PyTorch.

    The files are `export/student.onnx`, `student.fp16.onnx`, `student.pt2`, `student.engine`, … in the bundle, or
    `network.onnx`, … in `out`, each with a sidecar. A file beyond the target's tolerance is kept as
    `student.onnx.rejected`, and the artefact it would have replaced stays. An engine built ahead of time for GPUs
    elsewhere is not run; `parity` in its details is None.

    Args:
        source: a bundle or its folder; or a network that is exported uncompressed: a file of weights, a folder that
            transformers saved, a loaded network or a module.
        out: the folder for an uncompressed network's files; None: `exported`.
        precisions: of weights and arithmetic.
        io_precision: of images and logits.
        embed_preprocessing: whether the files take pixels, uint8 (N, H, W, C), and normalize them.
        calibration_images: training images on which magnitudes (fp16, bf16) and ranges (int8) are measured.
        triton_repository: a folder for a model repository of Triton Inference Server with the files of this call.
        target: where the student will run, or that target's name or path; None: `cuda` if CUDA is available, else
            `cpu`.
        data: the dataset, or its source, whose test images are compared, or your own Dataset, arrays or DataLoader;
            None: the one that the student learned on; an uncompressed network, or a student of data that were given in
            Python, is then compared on noise, and in fp32 alone.
        network: needed if the network is the user's code, or if its file does not identify it.
        normalise, input_shape, task: of an uncompressed network, if not known: see `networks.load`.
        progress: called with a line about what was chosen, or left out.
        **formats: True or False for each format by its key in `FORMATS` (`onnx`, on by default; `aoti`; `trt`), and the
            options of formats by name: of `trt` `compute_capabilities` (default: the target's, or the GPU at hand),
            `version_compatible` and `hardware_compatibility`.

    Returns:
        The manifest, with the artefacts under `onnx`, `onnx-fp16`, `aoti`, `trt`, ….

    Raises:
        BundleError: the bundle is incomplete, another process is working on it, or no space is left.
        CheckpointError: the file is no whole checkpoint, or does not fit its network.
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
    bundle = _bundle_of(source)
    folder: Bundle | ExportFolder
    if bundle is not None:
        bundle.read_complete()
        _check_compressed(bundle, out=out, normalise=normalise, input_shape=input_shape, task=task)
        folder = bundle
    else:
        assert not isinstance(source, Bundle)
        loaded, record = read_network(source, network, normalise, input_shape, task)
        folder = ExportFolder(DEFAULT_EXPORTS if out is None else out)
    chosen = resolve_target(target)
    _check_precisions(names, precisions, io_precision, chosen, target)
    device = _device_for(names, chosen)
    resolved = {name: _options_of(name, options, chosen, device, say) for name in names}
    with folder.lock():
        tidy(folder.export_path)
        if isinstance(folder, Bundle):
            loaded = load(folder.student_path, network=network)
            check_one_pass(loaded)
            opened = open_test_data(folder.read_complete(), data, loaded, device)
        else:
            check_one_pass(loaded)
            opened = _claim(folder, loaded, record, settings_of(data), device)
        words = _words(folder, network, data, normalise=normalise, input_shape=input_shape, task=task)
        calibration = Calibration(opened, loaded, calibration_images)
        if opened is None and any(precision != "fp32" for precision in precisions):
            _ = calibration.inputs  # refused before a file is written
        evidence = Evidence.of(opened, loaded, chosen.batch_sizes[-1], device)
        job = Job(
            loaded,
            chosen,
            device,
            io_precision=io_precision,
            embed_preprocessing=embed_preprocessing,
            calibration=calibration,
        )
        written: list[Artefact] = []
        for name in names:
            for precision in dict.fromkeys(precisions):
                one = replace(job, precision=precision, options=resolved[name])
                one = replace(one, command=_command(words, name, one, target))
                manifest = _export_one(folder, name, one, evidence)
                written.append(manifest.artefacts[kind_of(name, precision)])
        if triton_repository is not None:
            _write_triton(folder, written, Path(triton_repository), loaded, job, say)
        return manifest


def _bundle_of(source: Bundle | Network | nn.Module | str | Path) -> Bundle | None:
    """The bundle whose student is exported; None if the source is a network."""
    if isinstance(source, Bundle):
        return source
    if isinstance(source, Network | nn.Module):
        return None
    path, _ = published(source)
    return None if is_file(path) or path.suffix in SUFFIXES else Bundle(path)


def _check_compressed(bundle: Bundle, **given: Any) -> None:
    """Check that no argument is given that only an uncompressed network takes.

    Raises:
        SettingsError: one is.
    """
    for key, value in given.items():
        if value is not None:
            raise SettingsError(
                f"--{key.replace('_', '-')}: {bundle.path} is a bundle, whose student has an input, and whose files "
                f"go to {bundle.export_path}. Leave it out, or name a network's weights: litdeploy export teacher.pt"
            )


def _claim(
    folder: ExportFolder,
    network: Network,
    record: TeacherRecord | None,
    settings: DataSettings | Objects | None,
    device: torch.device,
) -> Data | None:
    """Make a folder ready for a network's files, and open the data that they are compared on.

    Args:
        record: None: the network came from no file, and its weights are written into the folder.
    """
    opened = open_for(network, settings, device)
    if isinstance(settings, Objects):
        settings = None
    if settings is not None and settings.source is not None and Path(settings.source).exists():
        settings = settings.model_copy(update={"source": str(Path(settings.source).resolve())})

    def carry(folder: Path) -> None:
        if is_hub(network.spec.name):
            write_configuration(network.module, network.spec.name, folder)
        if opened is not None and opened.tokens is not None:
            opened.tokens.save(folder)

    record = record or _kept(folder, network)
    with staged(folder.weights_path) as weights:
        if record is None:
            sha256 = write_checkpoint(weights, network.module.state_dict(), network.spec)
            record = TeacherRecord(path=str(folder.weights_path.resolve()), sha256=sha256, spec=network.spec)
        folder.claim(Exports(litdeploy=__version__, network=record, data=settings))
        if is_file(weights):
            weights.replace(folder.weights_path)
    carried = folder.carry(carry)
    folder.write(folder.read().model_copy(update={"carried": carried}))
    return opened


def _kept(folder: ExportFolder, network: Network) -> TeacherRecord | None:
    """The record of the weights that an earlier export of this network in memory left; None if there are none."""
    if not is_file(folder.weights_path) or not is_file(folder.manifest_path):
        return None
    record, kept = folder.read().network, read_checkpoint(folder.weights_path)
    own = network.module.state_dict()
    same = kept.sha256 == record.sha256 and kept.spec == network.spec and kept.weights.keys() == own.keys()
    return record if same and all(torch.equal(kept.weights[name], own[name].cpu()) for name in own) else None


def _words(
    folder: Bundle | ExportFolder,
    network: NetworkName | None,
    data: Any,
    *,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    task: TaskName | None,
) -> list[str]:
    """What to type after `litdeploy export` to export the same network; what was made in Python has no name to type."""
    if isinstance(folder, Bundle):
        return [] if folder.path == DEFAULT_PATH else [str(folder.path)]
    settings = settings_of(data)
    options = {
        "--out": None if folder.path == DEFAULT_EXPORTS else str(folder.path),
        "--network": network if isinstance(network, str) else None,
        "--normalise": normalise,
        "--input-shape": None if input_shape is None else ",".join(map(str, input_shape)),
        "--task": task,
        "--data": settings.source if isinstance(settings, DataSettings) else None,
    }
    given = [word for option, value in options.items() if value is not None for word in (option, value)]
    return [folder.read().network.path, *given]


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


def _options_of(
    name: str, given: Mapping[str, Any], target: Target, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """A format's options, completed by the target and the defaults, and checked by the format."""
    found: dict[str, Any] = {}
    for option in FORMATS[name].options:
        value = given.get(option.name, option.default)
        if isinstance(option.default, tuple):
            at_target = getattr(target, option.from_target) if option.from_target else None
            value = tuple(value) or (() if at_target is None else (at_target,))
        found[option.name] = value
    if reference := FORMATS[name].check:
        check: CheckFunction = imported(reference)
        if line := check(target, device, found):
            say(line)
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


def _export_one(folder: Bundle | ExportFolder, name: str, job: Job, evidence: Evidence) -> Manifest | Exports:
    """Build, verify and enter one file."""
    path = folder.export_path / file_of(name, job.precision, folder.role)
    with staged(path) as candidate:
        artefact = build_artefact(name, job, candidate, path.relative_to(folder.path).as_posix())
        parity = _parity(name, job, candidate, evidence) if artefact.runs_here else None
        details = {**artefact.details, "parity": parity and parity.model_dump(mode="json")}
        artefact = artefact.model_copy(update={"details": details})
        if parity is not None and not parity.within:
            raise beyond_tolerance(folder, path, reject(candidate, path, artefact), parity)
        # Before the file is another one: a manifest never names one that is missing.
        folder.drop_artefact(kind_of(name, job.precision))
        keep(candidate, path, artefact)
    return folder.add_artefact(kind_of(name, job.precision), artefact)


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
        return compare_runners(reference, candidate, taken.inputs, sizes, tolerance, spec, taken.labels_N)


def _write_triton(
    source: Bundle | ExportFolder,
    artefacts: Sequence[Artefact],
    folder: Path,
    student: Network,
    job: Job,
    say: Callable[[str], None],
) -> None:
    """Write a model repository of the files that Triton serves."""
    served = []
    for artefact in artefacts:
        path = source.artefact_path(artefact)
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


def beyond_tolerance(folder: Bundle | ExportFolder, path: Path, kept: Path, parity: Parity) -> ParityError:
    """The error of an artefact that does not compute what its network computes."""
    return ParityError(
        f"{path.name} does not compute what the {folder.role} computes:\n{parity.summary()}\n"
        f"The file is kept as {kept}. Find the layer that differs: litdeploy verify {folder.path} --bisect. "
        "If the difference does not matter to you, raise `tolerance` in your own target: litdeploy export "
        "--target my-target.yaml"
    )


def _command(source: Sequence[str], name: str, job: Job, target: Target | str | None) -> str:
    """What to type for one artefact; a target made in Python has no name to type."""
    words = ["litdeploy", "export", *source, f"--{name}"]
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
