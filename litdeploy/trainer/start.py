"""What a run starts with: the teacher, the plan, the student before its first step, the frozen copy and its cache."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from torch import nn

from litdeploy.bundle import Bundle, TeacherRecord
from litdeploy.checkpoint import read_checkpoint, write_checkpoint
from litdeploy.data import Data
from litdeploy.errors import NetworkError, StudentError
from litdeploy.networks import FAMILIES, Network, NetworkName, Section, build, load, request
from litdeploy.networks.registry import is_code
from litdeploy.networks.student import make_plan, make_student, plan_for_depth
from litdeploy.recipe import Recipe
from litdeploy.spec import DepthPlan, InputSpec
from litdeploy.trainer.cache import FeatureCache, Layout
from litdeploy.trainer.objectives import OBJECTIVES
from litdeploy.trainer.plan import AUTO_VIEWS, compiles_teacher, fallback, forward_flops, plan_cache
from litdeploy.trainer.run import Run
from litdeploy.trainer.state import views_saved
from litdeploy.trainer.step import inputs_needed, outputs_needed
from litdeploy.trainer.teacher import Teacher

_MOST_TOLD = 10


def plan_of(teacher: Network, sections: list[Section], recipe: Recipe) -> DepthPlan:
    """The student's plan, by the recipe's depth or blocks.

    Raises:
        StudentError: neither is given, or no such student is possible.
    """
    family = FAMILIES.get(teacher.spec.name)
    if recipe.student_blocks is not None:
        return make_plan(sections, recipe.student_blocks)
    if recipe.student_depth is None:
        raise StudentError(
            "how deep the student shall be is missing: --student-depth N, or --student-blocks layer1=3,…"
        )
    return plan_for_depth(sections, recipe.student_depth, family)


def tell_left_out(data: Data, note: Callable[[str], None]) -> None:
    """Says which images are left out, as they cannot be decoded.

    Raises:
        DataError: they are more than the recipe allows.
    """
    faults = data.left_out()
    for why in faults[:_MOST_TOLD]:
        note(f"warning: left out: {why}")
    if len(faults) > _MOST_TOLD:
        note(f"warning: left out: {len(faults) - _MOST_TOLD} more images")


def load_teacher(
    teacher: str | Path | Network, recipe: Recipe, network: NetworkName | None
) -> tuple[Network, TeacherRecord | None]:
    """The teacher with its record; a network in memory has none yet.

    Raises:
        NetworkError: the recipe, which may be a stranger's file, names code, and the caller does not.
    """
    if isinstance(teacher, Network):
        return teacher, None
    if network is None and recipe.network is not None and is_code(recipe.network):
        raise NetworkError(
            f"the recipe says network: {recipe.network!r}, which is code. It is run only when you name it: "
            f"--network {shlex.quote(recipe.network)}"
        )
    checkpoint = read_checkpoint(teacher)
    loaded = load(
        checkpoint,
        network=network if network is not None else recipe.network,
        normalise=recipe.normalise,
        input_shape=recipe.input_shape,
    )
    record = TeacherRecord(path=str(Path(teacher).resolve()), sha256=checkpoint.sha256, spec=loaded.spec)
    return loaded, record


def keep_teacher(bundle: Bundle, teacher: Network) -> TeacherRecord:
    """A teacher that came from no file is written beside its student, so that later stages find it."""
    sha256 = write_checkpoint(bundle.teacher_path, teacher.module.state_dict(), teacher.spec)
    return TeacherRecord(path=str(bundle.teacher_path.resolve()), sha256=sha256, spec=teacher.spec)


def start_student(teacher: Network, plan: DepthPlan, recipe: Recipe, network: NetworkName | None) -> nn.Module:
    """The student before its first step, as the method or the recipe's `init` has it."""
    default = OBJECTIVES[recipe.method].init
    if default == "scratch" and recipe.init == "copy":
        raise StudentError("--method scratch copies nothing from the teacher; leave --init out, or choose --method kd.")
    init = "scratch" if default == "scratch" else recipe.init or default
    if init == "copy":
        return make_student(teacher.module, plan)
    asked = None if network is None else request(network)
    if asked is not None and not asked.initialises:
        raise StudentError("fresh blocks need a function that builds the network: pass network=build, not a module.")
    fresh = build(teacher.spec, asked, teacher.source, recipe.seed)
    return make_student(fresh if init == "scratch" else teacher.module, plan, fresh)


def add_teacher(run: Run, teacher: Network, sha256: str, folder: Path, keep: bool) -> None:
    """Gives the run its frozen teacher, and its feature cache where there is to be one.

    Args:
        sha256: of the teacher's file.
        folder: where features are, if they are kept in files.
        keep: whether they shall be, for further students.

    Raises:
        TrainingError: see `plan_cache` and `FeatureCache`.
    """
    taught = [phase for phase in run.phases if phase.objective.needs_teacher]
    if not taught:
        return
    recipe, images = run.recipe, len(run.data.train)
    epochs = sum(phase.settings.epochs for phase in taught)
    own = images if recipe.parallel == "sections" else images / run.ranks.size
    flops = epochs * own * forward_flops(teacher.module, teacher.example())
    compiled = compiles_teacher(recipe.compile, flops, run.device)
    tell = fallback(recipe.compile, run.progress.note)
    run.teacher = Teacher(teacher.module, run.sections, teacher.example(), run.device, run.precision, compiled, tell)
    # For further students all of it, since their method may be another.
    inputs = set(run.sections) if keep else set().union(*(inputs_needed(p.objective, run.sections) for p in taught))
    outputs = set(run.sections) if keep else set().union(*(outputs_needed(p.objective) for p in taught))
    layout = Layout.of(run.teacher.template, inputs, outputs)
    # A run that is gone on with sees the views that it saw, whatever memory there is now.
    setting = recipe.feature_cache if run.saved is None else views_saved(run.saved) or "off"
    views = AUTO_VIEWS if isinstance(run.input, InputSpec) else 1  # a text is the same each time
    plan = plan_cache(setting, layout, images, epochs, run.device, folder, keep, run.ranks.size, views)
    run.progress.note(plan.why)
    if not plan.views or layout is None:
        return
    key = {
        "teacher": sha256,
        "data": run.data.record().fingerprint,
        "data_settings": recipe.data.model_dump(mode="json", exclude={"source", "workers", "resident"}),
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
