"""The verb: teacher and student side by side in every runner of a target."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from litdeploy.batch import moved
from litdeploy.bundle import DEFAULT_PATH, Accuracy, Bundle, Fidelity, Manifest
from litdeploy.errors import BundleError, NetworkError
from litdeploy.exporter import FORMS, Parity
from litdeploy.exporter.forms import runs_here
from litdeploy.exporter.teacher import load_teacher
from litdeploy.networks import FAMILIES, Network, NetworkName, describe, find_sections, load
from litdeploy.profiler.breakdown import Breakdown, break_down
from litdeploy.profiler.environment import Environment, look_around
from litdeploy.profiler.report import Measurement, RawSamples, Report, Side, SideTiming, headline, read_training, write
from litdeploy.profiler.statistics import compare, summarise
from litdeploy.profiler.teacher import teacher_engine, teacher_onnx, teacher_package
from litdeploy.profiler.timing import measure
from litdeploy.profiler.verdict import milliseconds, sentence, times
from litdeploy.runtime import open_runner, resolve_device, resolve_target
from litdeploy.target import Target

Progress = Callable[[str], None]

# Runners that take an exported file and not the module, each with the form of export that makes it.
_FORMS = {**{form.runner: name for name, form in FORMS.items()}, "onnxruntime-graph": "onnx", "tensorrt-graph": "trt"}


def profile(
    bundle: Bundle | str | Path = DEFAULT_PATH,
    *,
    teacher: str | Path | None = None,
    target: Target | str | Path | None = None,
    network: NetworkName | None = None,
    progress: Progress | None = None,
) -> Report:
    """Times teacher and student in every runner of a target, and reports it with all that belongs to it.

    Writes `profile/report.json`, `report.html` and `samples.json` into the bundle.

    Args:
        bundle: as `compress` left it; with its student exported, where a runner of the target takes ONNX.
        teacher: the teacher's file, where it is no longer where it was.
        target: a target, or the name or path of one; None: the one for this machine.
        network: the network, where it is code of the user's.
        progress: is given a line for each step.

    Raises:
        BundleError: no complete bundle, no exported student, or the teacher's file is gone or is another one.
        SettingsError: no such target.
        DeviceError: the target's device is not there.
        RunnerError: a runner cannot run a network.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    say = progress or (lambda line: None)
    manifest = bundle.read_complete()
    chosen = resolve_target(target)
    device = resolve_device(chosen.device)
    environment = look_around(device)

    networks = {
        "teacher": load_teacher(bundle, manifest, teacher, network),
        "student": load(bundle.student_path, network=network),
    }
    sections = _sections(networks["teacher"])
    sides = {role: _side(role, manifest, each, break_down(each, sections)) for role, each in networks.items()}
    files = {
        runner: _files(runner, bundle, manifest, networks["teacher"], device, say)
        for runner in chosen.runners
        if runner in _FORMS
    }

    measured: list[tuple[Measurement, RawSamples]] = []
    for runner in chosen.runners:
        measured += _measure_runner(runner, networks, files.get(runner, {}), chosen, device, say)

    report = _report(bundle, manifest, sides, [measurement for measurement, _ in measured], environment, chosen, target)
    write(report, [samples for _, samples in measured], bundle.profile_path)
    return report


def _files(
    runner: str, bundle: Bundle, manifest: Manifest, teacher: Network, device: torch.device, say: Progress
) -> dict[str, Path]:
    """Both sides' exported files for a runner that takes such."""
    form = _FORMS[runner]
    if form not in manifest.artefacts:
        raise BundleError(
            f"{bundle.path}: holds no exported student, which the target's runner {runner} takes. "
            f"Run `litdeploy export{_folder(bundle)} --{form}` first."
        )
    artefact = manifest.artefacts[form]
    student = bundle.artefact_path(artefact)
    digest = manifest.teacher.sha256
    if not runs_here(artefact):
        raise BundleError(
            f"{student}: was built ahead of time for GPUs elsewhere. Export it on the machine that it is profiled on: "
            f"litdeploy export{_folder(bundle)} --{form}"
        )
    if form == "trt":
        say("teacher as TensorRT engine")
        return {"teacher": teacher_engine(bundle, teacher, digest, artefact, device), "student": student}
    if form == "aoti":
        say("teacher as AOTInductor package")
        return {"teacher": teacher_package(bundle, teacher, digest, device), "student": student}
    say("teacher as ONNX")
    return {"teacher": teacher_onnx(bundle, teacher, digest, artefact.details["opset"]), "student": student}


def _measure_runner(
    name: str,
    networks: dict[str, Network],
    files: dict[str, Path],
    target: Target,
    device: torch.device,
    say: Progress,
) -> list[tuple[Measurement, RawSamples]]:
    """Both sides in one runner, at every batch size.

    Args:
        files: role → file that runs in the network's place; empty where the runner takes the module.
    """
    sources: dict[str, dict[str, Any]] = {
        role: {FORMS[_FORMS[name]].source: files[role]} if files else {"network": network}
        for role, network in networks.items()
    }
    results = []
    how: dict[str, Any] = {
        "device": device,
        "compile_mode": target.compile_mode,
        "memory_limit": target.memory_limit,
    }
    with (
        open_runner(name, **sources["teacher"], **how) as teacher,
        open_runner(name, **sources["student"], **how) as student,
    ):
        for batch_size in target.batch_sizes:
            timed = measure(teacher, student, moved(networks["student"].example(batch_size), device), target.timing)
            runners = {"teacher": teacher.describe(), "student": student.describe()}
            timings = {
                role: SideTiming(
                    **summarise(samples.milliseconds, batch_size).model_dump(),
                    first_run_ms=samples.first_run_ms,
                    build_seconds=runners[role].build_seconds,
                    artefact=str(files[role]) if files else None,
                )
                for role, samples in (("teacher", timed.teacher), ("student", timed.student))
            }
            comparison = compare(timed.teacher.milliseconds, timed.student.milliseconds)
            measurement = Measurement(
                runner=name,
                mode=runners["student"].mode,
                device=str(device),
                precision=runners["student"].precision,
                batch_size=batch_size,
                clock=timed.clock,
                teacher=timings["teacher"],
                student=timings["student"],
                comparison=comparison,
            )
            results.append((measurement, RawSamples(runner=name, batch_size=batch_size, timed=timed)))
            say(
                f"{name}, batch {batch_size}: teacher {milliseconds(timings['teacher'].median_ms)} ms, "
                f"student {milliseconds(timings['student'].median_ms)} ms, {times(comparison.speedup)} "
                f"({comparison.verdict})"
            )
    return results


def _sections(teacher: Network) -> list[str]:
    """Names of its sections; a network that was only narrowed may have none."""
    try:
        return [section.name for section in find_sections(teacher.module, teacher.example())]
    except NetworkError:
        return []


def _side(role: str, manifest: Manifest, network: Network, breakdown: Breakdown) -> Side:
    spec = network.spec
    scores = manifest.metrics.get(role, {}).items()
    family = FAMILIES.get(spec.name)
    kind = type(network.module).__name__ if family else spec.name
    return Side(
        name=f"{kind}-{breakdown.depth}" if family else f"{kind} of {breakdown.depth} blocks",
        network=describe(spec.name, spec.arguments),
        plan=spec.plan,
        path=network.source,
        sha256=manifest.teacher.sha256 if role == "teacher" else manifest.student_sha256,
        bytes=Path(network.source).stat().st_size,
        breakdown=breakdown,
        accuracy={split: score for split, score in scores if isinstance(score, Accuracy)},
        likeness={split: score for split, score in scores if isinstance(score, Fidelity)},
    )


def _report(
    bundle: Bundle,
    manifest: Manifest,
    sides: dict[str, Side],
    measurements: Sequence[Measurement],
    environment: Environment,
    target: Target,
    asked: Target | str | Path | None,
) -> Report:
    teacher, student = sides["teacher"], sides["student"]
    onnx = manifest.artefacts.get("onnx")
    return Report(
        verdict=sentence(teacher, student, headline(measurements), environment.device_name),
        bundle=str(bundle.path),
        student_sha256=manifest.student_sha256,
        onnx_sha256=onnx.sha256 if onnx else None,
        teacher=teacher,
        student=student,
        # Networks without sections have no depth, and one of them is as deep as the other.
        depth_ratio=teacher.breakdown.depth / student.breakdown.depth if student.breakdown.depth else 1.0,
        parameter_ratio=teacher.breakdown.parameters / student.breakdown.parameters,
        flop_ratio=teacher.breakdown.flops / student.breakdown.flops,
        measurements=tuple(measurements),
        parity=Parity.model_validate(onnx.details["parity"]) if onnx else None,
        training=read_training(bundle.metrics_path),
        data=manifest.data,
        test_used_once="test" in student.likeness or ("test" in teacher.accuracy and "test" in student.accuracy),
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
