"""The plan of a run: which student it trains, from which sections, in which phases. Computed once, before any file is
written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from litdeploy.batch import forward
from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan
from litdeploy.errors import NetworkError, SettingsError, StudentError, first_line
from litdeploy.networks import (
    FAMILIES,
    Network,
    NetworkName,
    Section,
    build,
    new_like,
    request,
    sections_of,
)
from litdeploy.networks.sections import whole
from litdeploy.networks.student import (
    compose,
    depth_of,
    depths_of,
    divided,
    kept_of,
    make_plan,
    make_student,
    own_sections,
    plan_for_depth,
)
from litdeploy.networks.width import Match, match_sections
from litdeploy.tasks import task_of
from litdeploy.trainer.functions import Functions
from litdeploy.trainer.methods import METHODS, Start, TrainingPhase


@dataclass(frozen=True)
class Plan:
    """One run: a student and the phases that train it.

    Attributes:
        recipe: of this student.
        student: before its first step.
        phases: of the recipe's method.
        sections: the student's planned sections, in order.
        teacher_sections: the teacher's, in the same order.
        matches: each section of a student that is a network of its own, with the teacher's.
        functions: the user's own loss and metric; None: the task's.
    """

    recipe: Recipe
    student: Network
    phases: list[TrainingPhase]
    sections: tuple[Section, ...] = ()
    teacher_sections: tuple[Section, ...] = ()
    matches: tuple[Match, ...] = ()
    functions: Functions | None = None

    @property
    def trained(self) -> list[str]:
        """Names of the sections that have blocks to train."""
        return [section.name for section in self.sections if section.blocks]

    @property
    def called(self) -> dict[str, str]:
        """The teacher's section → the student's, by name."""
        names = zip(self.teacher_sections, self.sections, strict=True)
        return {teacher.name: student.name for teacher, student in names}


# The teacher and its sections → the influence of each one's blocks, measured on the data.
Influence = Callable[[Network, Sequence[Section]], Mapping[str, Sequence[float]]]


def plan_run(
    teacher: Network,
    recipe: Recipe,
    network: NetworkName | None,
    device: torch.device,
    influence: Influence | None = None,
    functions: Functions | None = None,
) -> Plan:
    """Plan the run of one student.

    Args:
        network: the teacher's network, if the caller names it; new blocks are built by it.
        device: of the training.
        influence: needed if the recipe chooses blocks by it.
        functions: the user's own loss and metric; None: the task's.

    Raises:
        StudentError: no such student is possible, or the method does not fit the teacher.
        NetworkError: the teacher has no sections, or the student's network is unknown.
        SettingsError: too few epochs for the method, or it has no loss that the user's own could replace.
    """
    method = METHODS[recipe.method]
    if functions is not None and "loss" in functions.functions and not method.has_teacher:
        raise SettingsError(
            f"loss={functions.names['loss']}: compares the student with its teacher, and --method {recipe.method} has "
            "none. Leave it out, or choose another method: --method lit"
        )
    student, sections, start = (
        _own_student(teacher, recipe, device) if method.student == "own" else _twin(teacher, recipe, network, influence)
    )
    phases = method.phases(recipe, replace(start, functions=functions))
    return Plan(recipe, student, phases, *sections, tuple(start.matches), functions)


def chain_of(teacher: Network, recipe: Recipe) -> list[Recipe]:
    """The recipe of each student in training order: one, or those of a chain, each of which teaches the next.

    Raises:
        StudentError: the teacher is a student already, or does not allow the chain, or the method does not.
    """
    if teacher.spec.plan is not None:
        raise StudentError(
            f"{teacher.source} is a student already. Compress its teacher to the depth you want, step by step if that "
            "helps: --student-depth 17,9"
        )
    if len(recipe.depths) < 2:
        return [recipe]
    method = METHODS[recipe.method]
    if method.student != "shallower":
        raise StudentError(
            f"{_option(recipe.depths)}: --method {recipe.method} makes no shallower student, and no chain of them. "
            "Choose another method: --method lit"
        )
    if not method.has_teacher:
        raise StudentError(
            f"{_option(recipe.depths)}: with --method {recipe.method} no student learns from a teacher, so a chain is "
            f"useless. Give {_option(recipe.depths[-1:])}"
        )
    sections = sections_of(teacher)
    family = FAMILIES.get(teacher.spec.name)
    deepest = depth_of(family, sections)
    shallower = tuple(depth for depth in recipe.depths if depth < deepest)
    if len(shallower) < len(recipe.depths):
        raise StudentError(
            f"{_option(recipe.depths)}: the teacher has depth {deepest}, and a chain begins with a shallower student. "
            + (f"Give {_option(shallower)}" if shallower else "`litdeploy inspect` lists the possible depths.")
        )
    recipes = []
    for index, depth in enumerate(recipe.depths):
        plan = plan_for_depth(sections, depth, family)
        sections = [
            replace(section, paths=tuple(section.paths[place] for place in kept_of(section, plan)))
            for section in sections
        ]
        # As if nothing followed: an earlier student equals that of the shorter chain.
        chain = recipe.depths[: index + 1]
        recipes.append(recipe.model_copy(update={"student_depth": chain if index else depth}))
    return recipes


def _option(depths: tuple[int, ...]) -> str:
    return f"--student-depth {','.join(map(str, depths))}"


def learned(teacher: Network, sections: Sequence[Section], plan: DepthPlan, recipe: Recipe) -> list[Section]:
    """The sections that a student of this plan learns, of the teacher: those that are found, or a long stack divided.

    Raises:
        StudentError: the stack cannot be divided as the recipe says.
    """
    shallower = METHODS[recipe.method].student == "shallower"
    # The families' students are published ones, with the sections of their papers.
    if not shallower or not sections or (recipe.sections == "auto" and teacher.spec.name in FAMILIES):
        return list(sections)
    return divided(sections, plan, recipe.sections)


def depth_plan(
    teacher: Network,
    sections: list[Section],
    recipe: Recipe,
    influence: Mapping[str, Sequence[float]] | None = None,
) -> DepthPlan:
    """The student's plan, by the recipe's depth or blocks.

    Args:
        influence: of each section's blocks; None: keep evenly spaced ones.

    Raises:
        StudentError: neither is given, or no such student is possible.
    """
    family = FAMILIES.get(teacher.spec.name)
    whole = make_plan(sections, {section.name: section.blocks for section in sections})
    keeps_all = METHODS[recipe.method].student == "whole"
    if recipe.student_blocks is not None:
        plan = make_plan(sections, recipe.student_blocks, influence)
        if keeps_all and {**whole, **plan} != whole:
            raise StudentError(
                f"--method {recipe.method} keeps all of the teacher's blocks, and --student-blocks asks for fewer. "
                "Leave it out, or choose another method: --method lit"
            )
        return whole if keeps_all else plan
    if keeps_all:
        depth = max(depths_of(family, sections), default=None)
        if recipe.student_depth not in (None, depth):
            raise StudentError(
                f"--method {recipe.method} keeps the teacher's depth, {depth}; --student-depth {recipe.student_depth} "
                f"asks for another. Give --student-depth {depth}, or choose another method: --method lit"
            )
        return whole
    if not recipe.depths:
        raise StudentError("the student's depth is missing: --student-depth N, or --student-blocks layer1=3,…")
    return plan_for_depth(sections, recipe.depths[-1], family, influence)


# The student's sections, and the teacher's in the same order.
_Sections = tuple[tuple[Section, ...], tuple[Section, ...]]


def _twin(
    teacher: Network, recipe: Recipe, network: NetworkName | None, influence: Influence | None
) -> tuple[Network, _Sections, Start]:
    """A student of the teacher's kind, with some or all of its blocks."""
    method = METHODS[recipe.method]
    try:
        sections = sections_of(teacher)
    except NetworkError:
        if method.student != "whole" or "fresh" in (recipe.init, method.init(recipe)):
            raise
        sections = []  # not needed if no block is left out or new
    measured = influence(teacher, sections) if influence is not None and recipe.blocks == "influence" else None
    plan = depth_plan(teacher, sections, recipe, measured)
    planned = learned(teacher, [section for section in sections if section.key in plan], plan, recipe)

    def fresh(seed: int) -> nn.Module:
        return _initial(teacher, plan, planned, recipe.model_copy(update={"seed": seed}), network)

    # A student that keeps all blocks needs no plan, and can be a teacher. A chain's plans refer to its first teacher.
    before = teacher.spec.plan
    kept = plan if before is None else compose(before, plan)
    spec = teacher.spec.with_(plan=kept if method.student == "shallower" else None)
    student = Network(_initial(teacher, plan, planned, recipe, network), spec, teacher.source)
    own = own_sections(student.module, planned, plan)
    names = [each.name for each in own if each.blocks]  # a section without blocks has nothing to train
    if planned and not names:
        raise StudentError(
            f"the student keeps no block of {', '.join(each.name for each in planned)}, so there is nothing to train. "
            "Keep one or more: --student-blocks"
        )
    _check_runs(student, plan)
    return student, (tuple(own), tuple(planned)), Start(names, student=student.module, fresh=fresh, teacher=teacher)


def _check_runs(student: Network, plan: DepthPlan) -> None:
    """Run the student once: its own code may name a block that was left out by its number, or need a first one."""
    try:
        with torch.no_grad():
            forward(student.module.eval(), student.example())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        kept = "; ".join(f"{name} {', '.join(map(str, blocks))}" for name, blocks in plan.items())
        raise StudentError(
            f"the network does not run with these blocks of its teacher alone: {kept} ({first_line(error)}). Keep "
            "others: --student-blocks"
        ) from None
    finally:
        student.module.train()


def _initial(
    teacher: Network, plan: DepthPlan, sections: Sequence[Section], recipe: Recipe, network: NetworkName | None
) -> nn.Module:
    """The student before its first step, as the method or the recipe's `init` has it."""
    method = METHODS[recipe.method]
    if method.init(recipe) != "copy" and recipe.init == "copy":
        raise _copies_nothing(recipe)
    init = method.initial(recipe)
    if init == "copy":
        return make_student(teacher.module, plan)
    asked = None if network is None else request(network)
    if asked is not None and not asked.initialises:
        raise StudentError("fresh blocks need a function that builds the network: pass network=build, not a module.")
    fresh = build(teacher.spec, asked, teacher.source, recipe.seed)
    return make_student(fresh if init == "scratch" else teacher.module, plan, fresh, sections)


def _own_student(teacher: Network, recipe: Recipe, device: torch.device) -> tuple[Network, _Sections, Start]:
    """A student that is a network of its own, with its sections matched to the teacher's."""
    task_of(teacher.spec).check_objective("logits", f"--method {recipe.method}:", teacher.spec.name)
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
    if teacher.spec.input.images is None:
        raise StudentError(
            f"--method {recipe.method} compares the channels of images, and {teacher.source} takes "
            f"{teacher.spec.input.kind}. Choose another method: --method lit"
        )
    student = new_like(named, teacher, recipe.seed)
    matches = [
        replace(match, channels=None if match.channels is None else match.channels.to(device))
        for match in match_sections(teacher, student)
    ]
    theirs = {section.name: section for section in sections_of(teacher)}
    sections = (
        tuple(whole(student.module, match.student) for match in matches),
        tuple(theirs[match.teacher] for match in matches),
    )
    return student, sections, Start([match.student for match in matches], matches, student.module, teacher=teacher)


def _copies_nothing(recipe: Recipe) -> StudentError:
    return StudentError(
        f"--method {recipe.method} copies no blocks from the teacher; leave --init out, or choose --method kd."
    )


def check_objectives(plan: Plan, teacher: Network, labeled: bool) -> None:
    """Raise StudentError if an objective cannot learn from the teacher's outputs, or from data without labels."""
    for phase in plan.phases:
        if phase.settings.epochs:
            what = f"--method {plan.recipe.method}: its phase '{phase.name}'"
            task_of(teacher.spec).check_objective(phase.objective.learns_by, what, teacher.spec.name)
            if phase.objective.needs_labels and not labeled:
                raise StudentError(
                    f"{what} learns from labels, and the data have none. Choose a method that learns from the teacher, "
                    "such as --method lit, or give labels: --label-column NAME, or a folder for each class"
                )
