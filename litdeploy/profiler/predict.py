"""The verb `predict`: the speed of students of several depths, before any of them is trained.

Time depends on the shapes of a network and not on its weights, so each student is made of the teacher's own blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from litdeploy.config.formats import FORMATS, format_of_runner
from litdeploy.config.spec import DepthPlan, TaskName
from litdeploy.config.target import Target, with_timing
from litdeploy.errors import SettingsError, StudentError
from litdeploy.exporter.build import Job, build_artefact
from litdeploy.networks import FAMILIES, Network, NetworkName, load, sections_of
from litdeploy.networks.student import make_student, own_sections, plan_for_depth
from litdeploy.profiler.analysis.breakdown import break_down, name_of
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.measure.runners import Pair, Program, measure_runners
from litdeploy.profiler.schema import PredictedStudent, Prediction
from litdeploy.runtime import resolve_device, resolve_target


def predict(
    teacher: str | Path | Network,
    depths: Sequence[int],
    *,
    target: Target | str | Path | None = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
    progress: Callable[[str], None] | None = None,
    **timing: Any,
) -> Prediction:
    """Time untrained students of these depths in the target's runners, each side by side with the teacher.

    Args:
        teacher: a file of weights, or a network.
        depths: values for `--student-depth`.
        target: a target, or its name or path; None: the default target of this machine.
        network, normalise, input_shape, task: see `load`.
        progress: called with a line for each step.
        **timing: fields of `target.Timing` that replace the target's own; None: keep the target's.

    Raises:
        CheckpointError, NetworkError: the teacher cannot be loaded, or has no repeated blocks.
        StudentError: a depth is not possible, or none is given.
        SettingsError, DeviceError: unknown target, invalid `timing`, or the target's device is not available.
        RunnerError: nothing could be measured.
    """
    say = progress or (lambda line: None)
    if not depths:
        raise StudentError("no depth to predict. Give at least one: --student-depth 8,14,20")
    if (timing.get("processes") or 1) > 1:
        raise SettingsError("--processes applies to a bundle; a prediction runs in one process. Leave it out.")
    if not isinstance(teacher, Network):
        teacher = load(teacher, network=network, normalise=normalise, input_shape=input_shape, task=task)
    chosen = with_timing(resolve_target(target), timing)
    device = resolve_device(chosen.device)
    environment = current_environment(device)
    sections = sections_of(teacher)
    plans = {depth: plan_for_depth(sections, depth, FAMILIES.get(teacher.spec.name)) for depth in sorted(set(depths))}
    whole = break_down(teacher, sections)
    students = []
    with TemporaryDirectory(prefix="litdeploy-") as folder, pinned(torch.get_num_threads()):
        files = _Files(Path(folder), teacher, chosen, device)
        for depth, plan in plans.items():
            student = _student(teacher, plan)
            size = break_down(student, own_sections(student.module, sections, plan))
            say(f"{name_of(student, size)}, not trained")
            results = measure_runners(partial(files.pair, student=student), chosen, device, say)
            results.check()
            students.append(
                PredictedStudent(
                    name=name_of(student, size),
                    depth=depth,
                    plan=plan,
                    breakdown=size,
                    depth_ratio=whole.depth / size.depth,
                    parameter_ratio=whole.parameters / size.parameters,
                    flop_ratio=whole.flops / size.flops,
                    measurements=tuple(results.measurements),
                    failures=tuple(results.failures),
                )
            )
    return Prediction(
        teacher=name_of(teacher, whole),
        path=teacher.source,
        noun=teacher.spec.input.noun,
        breakdown=whole,
        students=tuple(students),
        environment=environment,
        target=chosen,
    )


def _student(teacher: Network, plan: DepthPlan) -> Network:
    module = make_student(teacher.module, plan).eval().requires_grad_(False)
    return Network(module, teacher.spec.with_(plan=plan), teacher.source)


class _Files:
    """Exported files of teacher and students in a temporary folder."""

    def __init__(self, folder: Path, teacher: Network, target: Target, device: torch.device) -> None:
        self._folder, self._teacher = folder, teacher
        self._target, self._device = target, device
        self._teachers: dict[str, Program] = {}

    def pair(self, runner: str, student: Network) -> Pair:
        """Both sides for a runner; the teacher's file is made once."""
        name = format_of_runner(runner)
        if name is None:
            return Pair(Program(self._teacher), Program(student))
        if name not in self._teachers:
            self._teachers[name] = self._exported(self._teacher, "teacher", name)
        return Pair(self._teachers[name], self._exported(student, "student", name))

    def _exported(self, network: Network, role: str, name: str) -> Program:
        path = self._folder / f"{role}{FORMATS[name].suffix}"
        started = time.perf_counter()
        options = FORMATS[name].defaults()
        job = Job(network, self._target, self._device, options=options, command="litdeploy predict")
        build_artefact(name, job, path, path.name)
        return Program(network, path, time.perf_counter() - started)
