"""The verb: teacher and student side by side in every runner of a target."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

from litdeploy.bundle import DEFAULT_PATH, Artefact, Bundle, Manifest
from litdeploy.errors import BundleError, DataError
from litdeploy.exporter import Parity
from litdeploy.exporter.forms import runs_here
from litdeploy.exporter.teacher import load_teacher
from litdeploy.networks import Network, NetworkName, describe, find_sections, load
from litdeploy.profiler.breakdown import Breakdown, break_down, name_of
from litdeploy.profiler.environment import Environment, look_around
from litdeploy.profiler.fidelity import measure_fidelity
from litdeploy.profiler.measuring import FORM_OF, Pair, Program, Progress, Results, measure_runners
from litdeploy.profiler.report import Report, Side, headline, read_training, write
from litdeploy.profiler.teacher import teacher_engine, teacher_onnx, teacher_package
from litdeploy.profiler.trace import check_trace_path, write_trace
from litdeploy.profiler.verdict import sentence
from litdeploy.runtime import resolve_device, resolve_target
from litdeploy.target import Target, with_timing

_FORM_NAMES = {"onnx": "ONNX", "aoti": "AOTInductor package", "trt": "TensorRT engine"}


def profile(
    bundle: Bundle | str | Path = DEFAULT_PATH,
    *,
    teacher: str | Path | None = None,
    target: Target | str | Path | None = None,
    network: NetworkName | None = None,
    trace: str | Path | None = None,
    progress: Progress | None = None,
    **timing: Any,
) -> Report:
    """Times teacher and student in every runner of a target, and reports it with all that belongs to it.

    Writes `profile/report.json`, `report.html` and `samples.json` into the bundle.

    Args:
        bundle: as `compress` left it; with its student exported, where a runner of the target takes ONNX.
        teacher: the teacher's file, where it is no longer where it was.
        target: a target, or the name or path of one; None: the one for this machine.
        network: the network, where it is code of the user's.
        trace: a file for a trace of a few calls, for Perfetto; see `trace.write_trace`.
        progress: is given a line for each step.
        **timing: fields of `target.Timing` in place of the target's own; None: its own.

    Raises:
        BundleError: no complete bundle, or the teacher's file is gone or is another one.
        SettingsError: no such target, wrong `timing`, or the trace cannot be written there.
        DeviceError: the target's device is not there.
        RunnerError: nothing could be measured. What cannot be, beside something that can, is in the report's failures.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    say = progress or (lambda line: None)
    if trace is not None:
        check_trace_path(Path(trace))
    manifest = bundle.read_complete()
    chosen = with_timing(resolve_target(target), timing)
    device = resolve_device(chosen.device)
    environment = look_around(device)

    networks = {
        "teacher": load_teacher(bundle, manifest, teacher, network),
        "student": load(bundle.student_path, network=network),
    }
    sections = [section.name for section in find_sections(networks["teacher"].module, networks["teacher"].example())]
    sides = {role: _side(role, manifest, each, break_down(each, sections)) for role, each in networks.items()}

    def pairs(runner: str) -> Pair:
        if runner not in FORM_OF:
            return Pair(Program(networks["teacher"]), Program(networks["student"]))
        return _exported(runner, bundle, manifest, networks, device, say)

    results = measure_runners(pairs, chosen, device, say)
    results.check()
    report = _report(bundle, manifest, sides, results, environment, chosen, target)
    say("fidelity of the sections")
    try:
        fidelity = measure_fidelity(manifest, networks["teacher"], networks["student"], sections, device)
        report = report.model_copy(update={"fidelity": fidelity})
    except DataError as error:
        report = report.model_copy(update={"fidelity_missing": str(error)})
    write(report, results.samples, bundle.profile_path)
    if trace is not None:
        say(f"trace of both sides in {trace}")
        write_trace(Path(trace), networks, sections, device, report.headline.batch_size)
    return report


def _exported(
    runner: str, bundle: Bundle, manifest: Manifest, networks: dict[str, Network], device: torch.device, say: Progress
) -> Pair:
    """Both sides' exported files for a runner that takes such."""
    form = FORM_OF[runner]
    if form not in manifest.artefacts:
        raise BundleError(
            f"{bundle.path}: holds no exported student, which the target's runner {runner} takes. "
            f"Run `litdeploy export{_folder(bundle)} --{form}` first."
        )
    artefact = manifest.artefacts[form]
    student = bundle.artefact_path(artefact)
    if not runs_here(artefact):
        raise BundleError(
            f"{student}: was built ahead of time for GPUs elsewhere. Export it on the machine that it is profiled on: "
            f"litdeploy export{_folder(bundle)} --{form}"
        )
    say(f"teacher as {_FORM_NAMES[form]}")
    started = time.time()
    teacher = _teacher_file(form, bundle, networks["teacher"], manifest.teacher.sha256, artefact, device)
    # One that was there from before took no time now, and how long it took then is not known.
    made = time.time() - started if teacher.stat().st_mtime >= started else None
    return Pair(Program(networks["teacher"], teacher, made), Program(networks["student"], student))


def _teacher_file(
    form: str, bundle: Bundle, teacher: Network, sha256: str, student: Artefact, device: torch.device
) -> Path:
    match form:
        case "trt":
            return teacher_engine(bundle, teacher, sha256, student, device)
        case "aoti":
            return teacher_package(bundle, teacher, sha256, device)
        case _:
            return teacher_onnx(bundle, teacher, sha256, student.details["opset"])


def _side(role: str, manifest: Manifest, network: Network, breakdown: Breakdown) -> Side:
    spec = network.spec
    return Side(
        name=name_of(network, breakdown),
        network=describe(spec.name, spec.arguments),
        plan=spec.plan,
        path=network.source,
        sha256=manifest.teacher.sha256 if role == "teacher" else manifest.student_sha256,
        bytes=Path(network.source).stat().st_size,
        breakdown=breakdown,
        accuracy=manifest.metrics.get(role, {}),
    )


def _report(
    bundle: Bundle,
    manifest: Manifest,
    sides: dict[str, Side],
    results: Results,
    environment: Environment,
    target: Target,
    asked: Target | str | Path | None,
) -> Report:
    teacher, student = sides["teacher"], sides["student"]
    onnx = manifest.artefacts.get("onnx")
    return Report(
        verdict=sentence(teacher, student, headline(results.measurements), environment.device_name),
        bundle=str(bundle.path),
        student_sha256=manifest.student_sha256,
        onnx_sha256=onnx.sha256 if onnx else None,
        teacher=teacher,
        student=student,
        depth_ratio=teacher.breakdown.depth / student.breakdown.depth,
        parameter_ratio=teacher.breakdown.parameters / student.breakdown.parameters,
        flop_ratio=teacher.breakdown.flops / student.breakdown.flops,
        measurements=tuple(results.measurements),
        failures=tuple(results.failures),
        section_times=(),
        findings=(),
        parity=Parity.model_validate(onnx.details["parity"]) if onnx else None,
        training=read_training(bundle.metrics_path),
        data=manifest.data,
        test_used_once="test" in teacher.accuracy and "test" in student.accuracy,
        environment=environment,
        recipe=manifest.recipe,
        target=target,
        commands=_commands(bundle, teacher.path, asked),
    )


def _commands(bundle: Bundle, teacher: str, target: Target | str | Path | None) -> tuple[str, ...]:
    """What to type to do it all again; a target that was made in Python has no name to be typed."""
    named = f" --target {shlex.quote(str(target))}" if isinstance(target, str | Path) else ""
    out = "" if bundle.path == DEFAULT_PATH else f" --out {shlex.quote(str(bundle.path))}"
    return (
        f"litdeploy compress {shlex.quote(teacher)} --recipe recipe.yaml{out}",
        f"litdeploy export{_folder(bundle)} --onnx{named}",
        f"litdeploy profile{_folder(bundle)} --teacher {shlex.quote(teacher)}{named}",
    )


def _folder(bundle: Bundle) -> str:
    return "" if bundle.path == DEFAULT_PATH else f" {shlex.quote(str(bundle.path))}"
