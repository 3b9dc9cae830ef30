"""The verb `profile`: teacher and student timed side by side in every runner of a target."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from litdeploy.batch import forward
from litdeploy.config.recipe import Recipe
from litdeploy.config.target import Target, Timing, with_timing
from litdeploy.errors import BundleError, DataError, NetworkError, StudentError
from litdeploy.networks import Network, NetworkName, Section, describe, sections_of
from litdeploy.networks.student import own_sections
from litdeploy.profiler.analysis.breakdown import break_down, depth_ratio, name_of
from litdeploy.profiler.analysis.diagnosis import bounds, copy_bound, disturbances, ideal_ratio, launch_bound
from litdeploy.profiler.analysis.fidelity import Pairs, comparable, measure_fidelity
from litdeploy.profiler.analysis.verdict import sentence
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.machine.roofline import Rates, Work, count_work, measure_rates
from litdeploy.profiler.measure.processes import measure_in_processes
from litdeploy.profiler.measure.runners import Results, folder_argument, load_both, measure_bundle
from litdeploy.profiler.measure.section_times import measure_sections
from litdeploy.profiler.report.output import read_training, write_report
from litdeploy.profiler.report.trace import check_trace_path, write_trace
from litdeploy.profiler.schema import Breakdown, Finding, Measurement, Report, SectionTime, Side, headline
from litdeploy.runtime import resolve_device, resolve_target
from litdeploy.runtime.device import DTYPES
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Artefact, Manifest, Parity
from litdeploy.storage.staging import tidy
from litdeploy.tasks import task_of_scores
from litdeploy.trainer.plan import learned


def profile(
    bundle: Bundle | str | Path = DEFAULT_PATH,
    *,
    teacher: str | Path | None = None,
    target: Target | str | Path | None = None,
    network: NetworkName | None = None,
    trace: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **timing: Any,
) -> Report:
    """Time teacher and student in every runner of a target, and report speed, accuracy and what explains them.

    Write `profile/report.json`, `report.html` and `samples.json` into the bundle.

    Args:
        bundle: from `compress`; with the student exported for those runners of the target that take a file.
        teacher: the teacher's file, if it has moved.
        target: a target, or its name or path; None: the default target of this machine.
        network: the network, if it is the user's own code.
        trace: a file for a trace of a few calls, for Perfetto; see `trace.write_trace`.
        progress: called with a line for each step.
        **timing: fields of `target.Timing` that replace the target's own; None: keep the target's.

    Raises:
        BundleError: the bundle is incomplete or in use by another process, or the teacher's file is missing or
            another one.
        SettingsError: unknown target, invalid `timing`, or the trace cannot be written there.
        DeviceError: the target's device is not available.
        RunnerError: nothing could be measured. If only some of it could not, the report lists the failures.
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
        manifest = bundle.read_complete()
        environment = current_environment(device)
        networks = load_both(bundle, manifest, teacher, network)
        sections = _common_sections(networks["teacher"], networks["student"], manifest.recipe)
        sides = {
            role: _side(role, manifest, each, break_down(each, own))
            for (role, each), own in zip(networks.items(), sections, strict=True)
        }

        if chosen.timing.processes > 1:
            results = measure_in_processes(bundle, networks["teacher"].source, chosen, network, say)
        else:
            with pinned(torch.get_num_threads()):
                results = measure_bundle(bundle, manifest, networks, chosen, device, say)
        results.check()
        with pinned(torch.get_num_threads()):
            say("each section in eager PyTorch")
            batch_sizes = sorted({chosen.batch_sizes[0], chosen.batch_sizes[-1]})
            section_times = measure_sections(networks["teacher"], networks["student"], sections, batch_sizes, device)
            findings = _findings(sides, networks["student"], results, section_times, device)
        say("fidelity of the sections")
        report = _report(
            bundle,
            manifest,
            sides,
            results,
            **_fidelity(manifest, networks, sections, device),
            section_times=section_times,
            findings=findings,
            environment=environment,
            target=chosen,
            commands=_commands(bundle, sides["teacher"].path, target, chosen.timing),
        )
        write_report(report, results.samples, bundle.profile_path)
        if trace is not None:
            say(f"trace of both sides in {trace}")
            write_trace(
                Path(trace), networks, dict(zip(networks, sections, strict=True)), device, report.headline.batch_size
            )
    return report


def _fidelity(
    manifest: Manifest, networks: dict[str, Network], sections: Pairs, device: torch.device
) -> dict[str, Any]:
    """The report's fields on fidelity: the figures, or why they are missing. The rest of the report needs neither."""
    if not comparable(networks["teacher"], networks["student"], sections):
        return {"fidelity_missing": "the student's sections take or return other shapes than the teacher's"}
    try:
        return {"fidelity": measure_fidelity(manifest, networks["teacher"], networks["student"], sections, device)}
    except DataError as error:
        return {"fidelity_missing": str(error)}


def _common_sections(teacher: Network, student: Network, recipe: Recipe) -> tuple[list[Section], list[Section]]:
    """The teacher's sections, as the student learned them, and its own; none if it has no such containers."""
    plan = student.spec.plan
    try:
        sections = learned(teacher, sections_of(teacher), plan or {}, recipe)
        return sections, own_sections(student.module, sections, plan)
    except (NetworkError, StudentError):
        return [], []


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
        **Side.keyed(manifest.metrics.get(role, {})),
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

    @cache
    def float32_work(batch_size: int) -> Work:
        with torch.no_grad():
            return count_work(lambda: forward(student.module, student.example(batch_size)))

    def ceilings(measurement: Measurement) -> tuple[Work, Rates] | None:
        dtype = DTYPES.get(measurement.precision)
        if dtype is None:  # int8: torch has no matrix product to measure its ceiling with
            return None
        # Every precision moves the same number of values, in fewer bytes each.
        work = float32_work(measurement.batch_size)
        work = replace(work, bytes=work.bytes * dtype.itemsize / torch.float32.itemsize)
        return work, measure_rates(device, dtype)

    return (
        *ideal_ratio(sides["teacher"], sides["student"], headline(measured), section_times),
        *bounds(measured, ceilings),
        *launch_bound(measured),
        *copy_bound(measured),
        *disturbances(measured, results.samples),
    )


def _report(bundle: Bundle, manifest: Manifest, sides: dict[str, Side], results: Results, **fields: Any) -> Report:
    """The report.

    Args:
        **fields: its fields that do not follow from the other arguments.
    """
    teacher, student = sides["teacher"], sides["student"]
    task = task_of_scores(teacher.scores, student.scores)
    onnx = manifest.artefacts.get("onnx")
    return Report(
        verdict=sentence(
            teacher,
            student,
            headline(results.measurements),
            fields["environment"].device_name,
            len(manifest.student.classes),
        ),
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
        parity=_parity(bundle, onnx) if onnx else None,
        training=read_training(bundle.metrics_path),
        warnings=manifest.warnings,
        data=manifest.data,
        test_used_once=task.split(teacher.scores, student.scores) == "test",
        recipe=manifest.recipe,
        **fields,
    )


def _parity(bundle: Bundle, artefact: Artefact) -> Parity:
    try:
        return Parity.model_validate(artefact.details.get("parity"))
    except ValidationError:
        raise BundleError(
            f"{bundle.manifest_path}: has no record of the comparison of {artefact.path} with PyTorch. Export it "
            f"again: litdeploy export{folder_argument(bundle)} --onnx"
        ) from None


def _commands(bundle: Bundle, teacher: str, target: Target | str | Path | None, timing: Timing) -> tuple[str, ...]:
    """Commands that repeat the report; a target made in Python has no name to type."""
    named = f" --target {shlex.quote(str(target))}" if isinstance(target, str | Path) else ""
    out = "" if bundle.path == DEFAULT_PATH else f" --out {shlex.quote(str(bundle.path))}"
    how = (" --cold-cache" if timing.cold_cache else "") + (f" --pace {timing.pace:g}/s" if timing.pace else "")
    how += f" --processes {timing.processes}" if timing.processes > 1 else ""
    return (
        f"litdeploy compress {shlex.quote(teacher)} --recipe recipe.yaml{out}",
        f"litdeploy export{folder_argument(bundle)} --onnx{named}",
        f"litdeploy profile{folder_argument(bundle)} --teacher {shlex.quote(teacher)}{named}{how}",
    )
