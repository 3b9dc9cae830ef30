"""The verb `export`: from a bundle to verified artefacts in it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import torch

from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Precision, Target
from litdeploy.errors import ParityError, SettingsError
from litdeploy.exporter.checks import check_gpu, check_precisions, choice_for, device_for
from litdeploy.exporter.evidence import LEAST_IMAGES, Evidence, open_test_data
from litdeploy.exporter.forms import FORMS, Calibration, Form, Job, Options, file_of, kind_of
from litdeploy.exporter.parity import verify
from litdeploy.exporter.staging import keep, reject, staged, tidy, write_sidecar
from litdeploy.exporter.triton_repository import triton_repository as write_repository
from litdeploy.files import sha256_of
from litdeploy.networks import Network, NetworkName, load
from litdeploy.runtime import open_runner, resolve_target
from litdeploy.runtime.engine import HardwareCompatibility
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Artefact, Manifest, Parity
from litdeploy.tasks import task_of


def export(
    bundle: Bundle | str | Path = "deploy",
    *,
    onnx: bool = True,
    aoti: bool = False,
    trt: bool = False,
    precisions: Sequence[Precision] = ("fp32",),
    io_precision: Precision = "fp32",
    embed_preprocessing: bool = False,
    calibration_images: int = 512,
    compute_capabilities: Sequence[str] = (),
    version_compatible: bool = False,
    hardware_compatibility: HardwareCompatibility = "none",
    triton_repository: str | Path | None = None,
    target: Target | str | None = None,
    data: DataSettings | str | None = None,
    network: NetworkName | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Exports a bundle's student in each form and precision, once each computes on test images what PyTorch computes.

    The files are `export/student.onnx`, `student.fp16.onnx`, `student.pt2`, `student.engine`, …, each with a sidecar.
    Beyond the target's tolerance a file is kept as `student.onnx.rejected`, and an artefact of before stays. An engine
    that was built ahead of time, for GPUs that are elsewhere, is not run; its details then hold `parity` None.

    Args:
        bundle: a bundle, or its folder.
        onnx: whether to write ONNX.
        aoti: whether to write AOTInductor packages, for this kind of processor or the GPU at hand.
        trt: whether to build TensorRT engines: by `tensorrt` for the GPU at hand, or by `tensorrt_rtx` ahead of time.
        precisions: of weights and arithmetic.
        io_precision: of images and logits.
        embed_preprocessing: whether the files take pixels, uint8 (N, H, W, C), and normalise them themselves.
        calibration_images: training images on which magnitudes (fp16, bf16) and ranges (int8) are measured.
        compute_capabilities: of the GPUs that engines are built for, as in `8.6`; none: the target's, or that at hand.
        version_compatible, hardware_compatibility: of engines, see `EngineOptions`.
        triton_repository: a folder for a model repository of Triton Inference Server with the files of this call.
        target: where the student will run, or that target's name or path; None: `cuda` where CUDA is, else `cpu`.
        data: the dataset, or its source, whose test images are compared; None: the one that the student learned on.
        network: needed where the student's network is code of the user's.
        progress: is given a line about what was chosen, or left out.

    Returns:
        The manifest, with the artefacts under `onnx`, `onnx-fp16`, `aoti`, `trt`, ….

    Raises:
        BundleError: no whole bundle, one that another process is at work on, or no space left.
        NetworkError: the network cannot be exported, or is the user's code and was not named.
        SettingsError: no such target, a precision that it lacks, an operator set that cannot be had, or nothing to
            export.
        DependencyError: engines were asked for, and neither `tensorrt` nor `tensorrt_rtx` can build them.
        DeviceError, RunnerError: the target's device is not there, or a backend does not run on it.
        DataError: the images are not to be had, are none for this network, or too few.
        GateError: an engine is not in the precision that was asked for (exit code 3).
        ParityError: an artefact is further from PyTorch than the target's tolerance allows (exit code 3).
    """
    forms = [name for name, wanted in (("onnx", onnx), ("aoti", aoti), ("trt", trt)) if wanted]
    if not forms:
        raise SettingsError("nothing to export: say onnx=True, aoti=True or trt=True.")
    say = progress or (lambda line: None)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    bundle.read_complete()
    chosen = resolve_target(target)
    check_precisions(forms, precisions, io_precision, chosen, target)
    device = device_for(forms, chosen)
    if aoti:
        check_gpu(chosen, device)
    options = Options(
        io_precision,
        embed_preprocessing,
        calibration_images,
        tuple(compute_capabilities) or ((chosen.compute_capability,) if trt and chosen.compute_capability else ()),
        version_compatible,
        hardware_compatibility,
    )
    choice = choice_for(trt, options, device)
    if choice is not None:
        say(choice.told())
    with bundle.lock():
        manifest = bundle.read_complete()
        tidy(bundle.export_path)
        student = load(bundle.student_path, network=network)
        opened = open_test_data(manifest, data, student, device)
        evidence = Evidence.of(opened, student, max(LEAST_IMAGES, chosen.batch_sizes[-1]))
        calibration = Calibration(opened, student, calibration_images)
        written: list[Artefact] = []
        for form in forms:
            for precision in dict.fromkeys(precisions):
                command = _command(bundle, form, precision, options, target)
                job = Job(student, precision, chosen, device, options, calibration, command, choice)
                manifest = _export_one(bundle, form, job, evidence)
                written.append(manifest.artefacts[kind_of(form, precision)])
        if triton_repository is not None:
            _serve(bundle, written, Path(triton_repository), student, chosen, device, say)
        return manifest


def _export_one(bundle: Bundle, form_name: str, job: Job, evidence: Evidence) -> Manifest:
    """Writes, verifies and enters one file."""
    form = FORMS[form_name]
    path = bundle.export_path / file_of(form_name, job.precision)
    with staged(path) as candidate:
        written = form.write(job, candidate)
        details = {**written.details, "command": job.command}
        artefact = Artefact(
            path=path.relative_to(bundle.path).as_posix(),
            sha256=sha256_of(candidate),
            precision=job.precision,
            versions={**form.versions(), **written.versions},
            details=details,
        )
        write_sidecar(candidate, artefact)
        parity = None if written.built_for else _parity(job, form, candidate, evidence)
        details["parity"] = parity and parity.model_dump(mode="json")
        artefact = artefact.model_copy(update={"details": details})
        if parity is not None and not parity.within:
            raise beyond_tolerance(path, reject(candidate, path, artefact), parity)
        # Before the file is another one: a manifest never names one that is not there.
        bundle.drop_artefact(kind_of(form_name, job.precision))
        keep(candidate, path, artefact)
    return bundle.add_artefact(kind_of(form_name, job.precision), artefact)


def _parity(job: Job, form: Form, path: Path, evidence: Evidence) -> Parity:
    with (
        open_runner("eager", network=job.network, device=job.device) as reference,
        form.open(path, job.device, job.target) as candidate,
    ):
        tolerance = getattr(job.target.tolerance, job.precision)
        sizes = sorted(set(job.target.batch_profile))
        taken = evidence.in_calls(sizes[0], sizes[-1])
        spec = job.network.spec
        return verify(reference, candidate, taken.inputs, sizes, tolerance, spec.input, taken.labels_N)


def _serve(
    bundle: Bundle,
    artefacts: Sequence[Artefact],
    folder: Path,
    student: Network,
    target: Target,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Writes a model repository of what Triton serves."""
    served = []
    for artefact in artefacts:
        if artefact.details.get("library") == "tensorrt_rtx":
            say(
                f"{artefact.path}: left out of {folder}, since Triton loads engines of tensorrt and not of tensorrt_rtx"
            )
        else:
            served.append((bundle.artefact_path(artefact), artefact))
    models = write_repository(
        served,
        folder,
        classes=task_of(student.spec).output_labels(student.spec),
        batch_sizes=target.batch_sizes,
        device=cast("Literal['cpu', 'cuda']", device.type),
    )
    for model in models:
        say(f"{model}: a model for tritonserver --model-repository {folder}")


def beyond_tolerance(path: Path, kept: Path, parity: Parity) -> ParityError:
    """The error of an artefact that does not compute what the student computes."""
    return ParityError(
        f"{path.name} does not compute what the student computes:\n{parity.summary()}\n"
        f"The file is kept as {kept}. Find out which layer differs: litdeploy verify {path.parent.parent} --bisect. "
        "Where the difference does not matter to you, raise `tolerance` in a target of your own: litdeploy export "
        "--target my-target.yaml"
    )


def _command(bundle: Bundle, form: str, precision: str, options: Options, target: Target | str | None) -> str:
    """What to type for one artefact; a target that was made in Python has no name to be typed."""
    words = ["litdeploy", "export", *([] if bundle.path == DEFAULT_PATH else [str(bundle.path)]), f"--{form}"]
    words += ["--precision", precision]
    if options.io_precision != "fp32":
        words += ["--io-precision", options.io_precision]
    if options.embed_preprocessing:
        words += ["--embed-preprocessing"]
    if form == "trt":
        if options.compute_capabilities:
            words += ["--compute-capability", ",".join(options.compute_capabilities)]
        if options.version_compatible:
            words += ["--version-compatible"]
        if options.hardware_compatibility != "none":
            words += ["--hardware-compatibility", options.hardware_compatibility]
    if isinstance(target, str):
        words += ["--target", target]
    return shlex.join(words)
