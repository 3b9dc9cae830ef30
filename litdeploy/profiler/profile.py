"""The verb: teacher and student side by side in every runner of a target."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from litdeploy.config.target import Target, Timing, with_timing
from litdeploy.errors import BundleError, DataError, NetworkError
from litdeploy.exporter.staging import tidy
from litdeploy.networks import Network, NetworkName, describe, sections_of
from litdeploy.networks.batch import forward
from litdeploy.networks.sections import container
from litdeploy.profiler.analysis.breakdown import break_down, depth_ratio, name_of
from litdeploy.profiler.analysis.diagnosis import bounds, copy_bound, ideal_ratio, launch_bound
from litdeploy.profiler.analysis.disturbances import disturbances
from litdeploy.profiler.analysis.fidelity import comparable, measure_fidelity
from litdeploy.profiler.analysis.verdict import sentence
from litdeploy.profiler.machine import roofline
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.measure.processes import measure_in_processes
from litdeploy.profiler.measure.runners import (
    BundlePairs,
    Progress,
    Results,
    folder_argument,
    load_both,
    measure_runners,
)
from litdeploy.profiler.measure.section_times import measure_sections
from litdeploy.profiler.report.report_files import read_training, write_report
from litdeploy.profiler.report.trace import check_trace_path, write_trace
from litdeploy.profiler.schema import Breakdown, Environment, Finding, Measurement, Report, SectionTime, Side, headline
from litdeploy.runtime import resolve_device, resolve_target
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Accuracy, Artefact, Likeness, Manifest, Parity

# Whose ceilings are measured; ONNX Runtime's int8 has none in torch.
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        BundleError: no complete bundle, one that another process is at work on, or the teacher's file is gone or is
            another one.
        SettingsError: no such target, wrong `timing`, or the trace cannot be written there.
        DeviceError: the target's device is not there.
        RunnerError: nothing could be measured. What cannot be, beside something that can, is in the report's failures.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    say = progress or (lambda line: None)
    if trace is not None:
        check_trace_path(Path(trace))
    bundle.read_complete()
    chosen = with_timing(resolve_target(target), timing)
    device = resolve_device(chosen.device)
    with bundle.lock():
        tidy(bundle.profile_path)
        return _profile(bundle, teacher, chosen, target, device, network, trace, say)


def _profile(
    bundle: Bundle,
    teacher: str | Path | None,
    chosen: Target,
    target: Target | str | Path | None,
    device: torch.device,
    network: NetworkName | None,
    trace: str | Path | None,
    say: Progress,
) -> Report:
    manifest = bundle.read_complete()
    environment = current_environment(device)

    networks = load_both(bundle, manifest, teacher, network)
    sections = _sections(networks)
    sides = {role: _side(role, manifest, each, break_down(each, sections)) for role, each in networks.items()}

    if chosen.timing.processes > 1:
        results = measure_in_processes(bundle, networks["teacher"].source, chosen, network, say)
    else:
        with pinned(torch.get_num_threads()):
            results = measure_runners(BundlePairs(bundle, manifest, networks, device, say), chosen, device, say)
    results.check()
    with pinned(torch.get_num_threads()):
        say("each section in eager PyTorch")
        ends = sorted({chosen.batch_sizes[0], chosen.batch_sizes[-1]})
        section_times = measure_sections(networks["teacher"], networks["student"], sections, ends, device)
        findings = _findings(sides, networks["student"], results, section_times, device)
    report = _report(bundle, manifest, sides, results, environment, chosen, target).model_copy(
        update={"section_times": section_times, "findings": findings}
    )
    say("fidelity of the sections")
    report = report.model_copy(update=_fidelity(manifest, networks, sections, device))
    write_report(report, results.samples, bundle.profile_path)
    if trace is not None:
        say(f"trace of both sides in {trace}")
        write_trace(Path(trace), networks, sections, device, report.headline.batch_size)
    return report


def _fidelity(
    manifest: Manifest, networks: dict[str, Network], sections: list[str], device: torch.device
) -> dict[str, object]:
    """The report's fields on fidelity. Data that are gone cost these figures and not the whole report, and so does a
    student whose sections cannot be held against the teacher's."""
    if not comparable(networks["teacher"], networks["student"], sections):
        return {"fidelity_missing": "the student's sections take or give other shapes than the teacher's"}
    try:
        return {"fidelity": measure_fidelity(manifest, networks["teacher"], networks["student"], sections, device)}
    except DataError as error:
        return {"fidelity_missing": str(error)}


def _sections(networks: dict[str, Network]) -> list[str]:
    """Names of the teacher's sections; none where the student has no containers of these names."""
    teacher, student = networks["teacher"], networks["student"]
    try:
        names = [section.name for section in sections_of(teacher)]
        for name in names:
            container(student.module, name)
    except NetworkError:
        return []
    return names


def _side(role: str, manifest: Manifest, network: Network, breakdown: Breakdown) -> Side:
    spec = network.spec
    scores = manifest.metrics.get(role, {}).items()
    return Side(
        name=name_of(network, breakdown),
        network=describe(spec.name, spec.arguments),
        plan=spec.plan,
        path=network.source,
        sha256=manifest.teacher.sha256 if role == "teacher" else manifest.student_sha256,
        bytes=Path(network.source).stat().st_size,
        breakdown=breakdown,
        accuracy={split: score for split, score in scores if isinstance(score, Accuracy)},
        likeness={split: score for split, score in scores if isinstance(score, Likeness)},
    )


def _findings(
    sides: dict[str, Side],
    student: Network,
    results: Results,
    section_times: tuple[SectionTime, ...],
    device: torch.device,
) -> tuple[Finding, ...]:
    """The diagnosis."""
    measured = results.measurements
    headlined = headline(measured)
    works: dict[int, roofline.Work] = {}

    def ceilings(measurement: Measurement) -> tuple[roofline.Work, roofline.Rates] | None:
        dtype = _DTYPES.get(measurement.precision)
        if dtype is None:
            return None
        size = measurement.batch_size
        if size not in works:
            with torch.no_grad():
                works[size] = roofline.count(lambda: forward(student.module, student.example(size)))
        # What moves is as many numbers in each precision, and fewer bytes.
        work = replace(works[size], bytes=works[size].bytes * dtype.itemsize / torch.float32.itemsize)
        return work, roofline.measure(device, dtype)

    return (
        *ideal_ratio(sides["teacher"], sides["student"], headlined, section_times),
        *bounds(measured, ceilings),
        *launch_bound(measured),
        *copy_bound(measured),
        *disturbances(measured, results.samples),
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
        lineage=manifest.lineage,
        depth_ratio=depth_ratio(teacher.breakdown, student.breakdown),
        parameter_ratio=teacher.breakdown.parameters / student.breakdown.parameters,
        flop_ratio=teacher.breakdown.flops / student.breakdown.flops,
        measurements=tuple(results.measurements),
        failures=tuple(results.failures),
        section_times=(),
        findings=(),
        parity=_parity(bundle, onnx) if onnx else None,
        training=read_training(bundle.metrics_path),
        data=manifest.data,
        test_used_once="test" in student.likeness or ("test" in teacher.accuracy and "test" in student.accuracy),
        environment=environment,
        recipe=manifest.recipe,
        target=target,
        commands=_commands(bundle, teacher.path, asked, target.timing),
    )


def _parity(bundle: Bundle, artefact: Artefact) -> Parity:
    try:
        return Parity.model_validate(artefact.details.get("parity"))
    except ValidationError:
        raise BundleError(
            f"{bundle.manifest_path}: does not say how {artefact.path} was held against PyTorch. Export it again: "
            f"litdeploy export{folder_argument(bundle)} --onnx"
        ) from None


def _commands(bundle: Bundle, teacher: str, target: Target | str | Path | None, timing: Timing) -> tuple[str, ...]:
    """What to type to do it all again; a target that was made in Python has no name to be typed."""
    named = f" --target {shlex.quote(str(target))}" if isinstance(target, str | Path) else ""
    out = "" if bundle.path == DEFAULT_PATH else f" --out {shlex.quote(str(bundle.path))}"
    how = (" --cold-cache" if timing.cold_cache else "") + (f" --pace {timing.pace:g}/s" if timing.pace else "")
    how += f" --processes {timing.processes}" if timing.processes > 1 else ""
    return (
        f"litdeploy compress {shlex.quote(teacher)} --recipe recipe.yaml{out}",
        f"litdeploy export{folder_argument(bundle)} --onnx{named}",
        f"litdeploy profile{folder_argument(bundle)} --teacher {shlex.quote(teacher)}{named}{how}",
    )
