"""What a run starts with: the teacher, the plan, the student before its first step, the frozen copy and its cache."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan, InputSpec, image_of
from litdeploy.data import Data
from litdeploy.errors import NetworkError, StudentError
from litdeploy.networks import (
    FAMILIES,
    Network,
    NetworkName,
    Section,
    build,
    load,
    new_like,
    published,
    request,
    sections_of,
)
from litdeploy.networks.registry import is_code
from litdeploy.networks.student import compose, depths_of, make_plan, make_student, plan_for_depth
from litdeploy.networks.width import match_sections
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint, write_checkpoint
from litdeploy.storage.records import TeacherRecord
from litdeploy.trainer.cache import FeatureCache, Layout
from litdeploy.trainer.objectives import OBJECTIVES, Start, TrainingPhase
from litdeploy.trainer.plan import AUTO_VIEWS, compiles_teacher, fallback, forward_flops, plan_cache
from litdeploy.trainer.run import Run
from litdeploy.trainer.state import views_saved
from litdeploy.trainer.step import inputs_needed, outputs_needed
from litdeploy.trainer.teacher import Features, Teacher

_MOST_TOLD = 10


def plan_of(teacher: Network, sections: list[Section], recipe: Recipe) -> DepthPlan:
    """The student's plan, by the recipe's depth or blocks.

    Raises:
        StudentError: neither is given, or no such student is possible.
    """
    family = FAMILIES.get(teacher.spec.name)
    whole = make_plan(sections, {section.name: section.blocks for section in sections})
    keeps_all = OBJECTIVES[recipe.method].student == "whole"
    if recipe.student_blocks is not None:
        plan = make_plan(sections, recipe.student_blocks)
        if keeps_all and {**whole, **plan} != whole:
            raise StudentError(
                f"--method {recipe.method} keeps all of the teacher's blocks, and --student-blocks asks for fewer. "
                "Leave it out, or choose another method: --method lit"
            )
        return whole if keeps_all else plan
    if keeps_all:
        depth = max(depths_of(family, sections))
        if recipe.student_depth not in (None, depth):
            raise StudentError(
                f"--method {recipe.method} keeps the teacher's depth, {depth}; --student-depth {recipe.student_depth} "
                f"asks for another. Give --student-depth {depth}, or choose another method: --method lit"
            )
        return whole
    if not recipe.depths:
        raise StudentError(
            "how deep the student shall be is missing: --student-depth N, or --student-blocks layer1=3,…"
        )
    return plan_for_depth(sections, recipe.depths[-1], family)


def tell_left_out(data: Data, note: Callable[[str], None]) -> None:
    """Says which images are left out, as they cannot be decoded.

    Raises:
        DataError: they are more than the recipe allows.
    """
    faults = data.left_out()
    for why in faults[:_MOST_TOLD]:
        note(f"warning: left out: {why}")
    if len(faults) > _MOST_TOLD:
        note(f"warning: left out: {len(faults) - _MOST_TOLD} more {data.noun}s")


def load_teacher(
    teacher: str | Path | Network, recipe: Recipe, network: NetworkName | None
) -> tuple[Network, TeacherRecord | None]:
    """The teacher with its record; a network in memory has none yet. Where texts are cut to fewer tokens than it takes,
    it takes as many.

    Raises:
        NetworkError: the recipe, which may be a stranger's file, names code, and the caller does not.
    """
    if isinstance(teacher, Network):
        return teacher.within(recipe.data.text_length), None
    if network is None and recipe.network is not None and is_code(recipe.network):
        raise NetworkError(
            f"the recipe says network: {recipe.network!r}, which is code. It is run only when you name it: "
            f"--network {shlex.quote(recipe.network)}"
        )
    path, network = published(teacher, network if network is not None else recipe.network)
    checkpoint = read_checkpoint(path)
    loaded = load(checkpoint, network=network, normalise=recipe.normalise, input_shape=recipe.input_shape)
    loaded = loaded.within(recipe.data.text_length)
    record = TeacherRecord(path=str(path.resolve()), sha256=checkpoint.sha256, spec=loaded.spec)
    return loaded, record


def keep_teacher(bundle: Bundle, teacher: Network) -> TeacherRecord:
    """A teacher that came from no file is written beside its student, so that later stages find it."""
    sha256 = write_checkpoint(bundle.teacher_path, teacher.module.state_dict(), teacher.spec)
    return TeacherRecord(path=str(bundle.teacher_path.resolve()), sha256=sha256, spec=teacher.spec)


def begin(teacher: Network, recipe: Recipe, network: NetworkName | None, device: torch.device) -> tuple[Network, Start]:
    """The student before its first step, and what the method's phases are made of.

    Raises:
        StudentError: no such student is possible.
        NetworkError: the teacher has no sections, or the student's network is not known.
    """
    method = OBJECTIVES[recipe.method]
    which = method.student
    if which == "own":
        return _own_student(teacher, recipe, device)
    before = teacher.spec.plan
    try:
        sections = sections_of(teacher)
    except NetworkError:
        if which != "whole" or "fresh" in (recipe.init, method.init(recipe)):
            raise
        sections = []  # none is needed where no block is left out or made anew
    plan = plan_of(teacher, sections, recipe)

    def fresh(seed: int) -> nn.Module:
        return start_student(teacher, plan, recipe.model_copy(update={"seed": seed}), network)

    # A student that keeps all blocks needs no plan, and can be a teacher. A chain's plans are of its first teacher.
    kept = plan if before is None else compose(before, plan)
    spec = teacher.spec.with_(plan=kept if which == "shallower" else None)
    student = Network(start_student(teacher, plan, recipe, network), spec, teacher.source)
    names = [section.name for section in sections if section.name in plan]
    return student, Start(names, student=student.module, fresh=fresh, teacher=teacher)


def _own_student(teacher: Network, recipe: Recipe, device: torch.device) -> tuple[Network, Start]:
    if teacher.spec.translates:
        raise StudentError(
            f"--method {recipe.method}: learns by logits of classes, and {teacher.spec.name} makes images. Give "
            "--method lit --beta 0."
        )
    named = recipe.indistill.student if recipe.indistill else None
    if named is None:
        raise StudentError(
            f"--method {recipe.method} has a student of its own, and none is named: --student-network resnet20,width=8"
        )
    for option, value in (("depth", recipe.student_depth), ("blocks", recipe.student_blocks)):
        if value is not None:
            raise StudentError(
                f"--student-{option}: --method {recipe.method} has a student of its own, {named}. Leave it out, here "
                "and in the recipe."
            )
    if recipe.init == "copy":
        raise _copies_nothing(recipe)
    if not isinstance(teacher.spec.input, InputSpec):
        raise StudentError(
            f"--method {recipe.method} compares the channels of images, and {teacher.source} takes "
            f"{teacher.spec.input.kind}. Choose another method: --method lit"
        )
    student = new_like(named, teacher, recipe.seed)
    found = match_sections(teacher, student)
    matches = [
        replace(match, channels=None if match.channels is None else match.channels.to(device)) for match in found
    ]
    return student, Start([match.student for match in matches], matches, student.module, teacher=teacher)


def start_student(teacher: Network, plan: DepthPlan, recipe: Recipe, network: NetworkName | None) -> nn.Module:
    """The student before its first step, as the method or the recipe's `init` has it."""
    default = OBJECTIVES[recipe.method].init(recipe)
    if default != "copy" and recipe.init == "copy":
        raise _copies_nothing(recipe)
    init = "scratch" if default == "scratch" else recipe.init or default
    if init == "copy":
        return make_student(teacher.module, plan)
    asked = None if network is None else request(network)
    if asked is not None and not asked.initialises:
        raise StudentError("fresh blocks need a function that builds the network: pass network=build, not a module.")
    fresh = build(teacher.spec, asked, teacher.source, recipe.seed)
    return make_student(fresh if init == "scratch" else teacher.module, plan, fresh)


def _copies_nothing(recipe: Recipe) -> StudentError:
    return StudentError(
        f"--method {recipe.method} copies no blocks from the teacher; leave --init out, or choose --method kd."
    )


def add_teacher(run: Run, teacher: Network, start: Start, digest: str, folder: Path, keep: bool) -> None:
    """Gives the run its frozen teacher, and its feature cache where there is to be one.

    Args:
        start: tells which of the teacher's sections are the student's.
        digest: SHA-256 of the teacher's file or weights: features are read again only of the same teacher.
        folder: where features are, if they are kept in files.
        keep: whether they shall be, for further students.

    Raises:
        TrainingError: see `plan_cache` and `FeatureCache`.
    """
    taught = [phase for phase in run.phases if phase.objective.needs_teacher]
    if not taught:
        return
    recipe, images = run.recipe, len(run.data.train)
    # Behind a transition another one may teach, whose features and compiled form are its own.
    epochs = sum(phase.settings.epochs for phase in takewhile(lambda phase: phase.transition is None, taught))
    share = images if recipe.parallel == "sections" else images / run.ranks.size
    flops = epochs * share * forward_flops(teacher.module, teacher.example())
    compiled = compiles_teacher(recipe.compile, flops, run.device)
    tell = fallback(recipe.compile, run.progress.note)
    own = {match.teacher: match.student for match in start.matches} or {name: name for name in run.sections}
    run.teacher = Teacher(
        teacher.module, list(own), teacher.example(), run.device, run.precision, compiled, tell, called=own
    )
    layout = _layout(run, run.teacher.template, taught, keep)
    # A run that is gone on with sees the views that it saw, whatever memory there is now.
    setting = recipe.feature_cache if run.saved is None else views_saved(run.saved) or "off"
    views = AUTO_VIEWS if image_of(run.input) else 1  # a text is the same each time
    plan = plan_cache(setting, layout, images, epochs, run.device, folder, keep, run.ranks.size, views, run.data.noun)
    run.progress.note(plan.why)
    if not plan.views or layout is None:
        return
    key = {
        "teacher": digest,
        "data": run.data.record().fingerprint,
        "data_settings": recipe.data.model_dump(mode="json", exclude={"source", "workers", "resident", "tokenizer"}),
        **({} if run.data.tokens is None else {"tokenizer": run.data.tokens.fingerprint}),
        "held_out_by_seed": recipe.seed,
        "input": run.input.model_dump(mode="json"),
        "augmentation": recipe.augmentation.model_dump(mode="json"),
        "precision": run.precision,
    }
    run.cache = FeatureCache(
        run.teacher.template,
        layout,
        plan.views,
        images,
        recipe.augmentation.padding,
        run.device,
        folder if plan.mapped else None,
        key,
    )


def _layout(run: Run, template: Features, taught: Sequence[TrainingPhase], keep: bool) -> Layout | None:
    """What of the teacher's features is kept; None where it cannot be.

    A network that takes several tensors may give its sections what it makes of the others, as an attention mask, which
    is not kept: nor are then the sections' inputs. Often none is needed: a student's first section behind a frozen stem
    runs in its own chain.
    """
    needed: set[str] = set().union(*(inputs_needed(phase.objective, run.sections) for phase in taught))
    several = len(run.input.tensors) > 1
    # Of an image that is translated to another domain at each step, no view comes again.
    if run.spec.translates or (several and needed):
        return None
    # For further students all of it, since their method may be another.
    inputs = set(run.sections) if keep and not several else needed
    outputs = set(run.sections) if keep else set().union(*(outputs_needed(phase.objective) for phase in taught))
    return Layout.of(template, inputs, outputs)
