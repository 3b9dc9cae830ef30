"""A chain of students, each of which teaches the next. Each is trained in a run of its own, and is a whole bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from litdeploy.config.recipe import Recipe
from litdeploy.errors import BundleError, StudentError
from litdeploy.networks import FAMILIES, Network, sections_of
from litdeploy.networks.student import depth_of, plan_for_depth
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Ancestor, Manifest, Score, TeacherRecord
from litdeploy.trainer.objectives import OBJECTIVES, Start
from litdeploy.trainer.teacher import successor


@dataclass(frozen=True)
class Teaching:
    """Who teaches a student, and the line that it comes from.

    Attributes:
        network: the teacher.
        record: of the teacher that the chain began with; None: it came from no file, and is not written yet.
        lineage: from that one to `network`; empty where they are the same.
        scores: of that one, split → accuracy, where it was measured already.
    """

    network: Network
    record: TeacherRecord | None
    lineage: tuple[Ancestor, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)


def students_of(teacher: Network, recipe: Recipe) -> list[Recipe]:
    """The recipe of each student: one, or those of the chain, in the order in which they are trained.

    Raises:
        StudentError: a chain that the teacher or the method does not allow.
    """
    if len(recipe.depths) < 2:
        return [recipe]
    _check_method(teacher, recipe)
    sections = sections_of(teacher)
    family = FAMILIES.get(teacher.spec.name)
    deepest = depth_of(family, sections)
    shallower = [depth for depth in recipe.depths if depth < deepest]
    if len(shallower) < len(recipe.depths):
        raise StudentError(
            f"{_option(recipe.depths)}: the teacher has depth {deepest}, and a chain begins with a shallower student. "
            + (f"Give {_option(shallower)}" if shallower else "`litdeploy inspect` lists the depths that are possible.")
        )
    recipes = []
    for index, depth in enumerate(recipe.depths):
        plan = plan_for_depth(sections, depth, family)
        sections = [replace(section, blocks=len(plan[section.name])) for section in sections]
        # As if nothing came behind it: an earlier student is the one of the shorter chain.
        chain = recipe.depths[: index + 1]
        recipes.append(recipe.model_copy(update={"student_depth": chain if index else depth}))
    return recipes


def _check_method(teacher: Network, recipe: Recipe) -> None:
    method, last = OBJECTIVES[recipe.method], recipe.depths[-1]
    if method.student != "shallower":
        raise StudentError(
            f"{_option(recipe.depths)}: --method {recipe.method} makes no shallower student, and no chain of them. "
            "Choose another method: --method lit"
        )
    # Any name does: nothing is run.
    if not any(phase.objective.needs_teacher for phase in method.phases(recipe, Start(["layer1"], teacher=teacher))):
        raise StudentError(
            f"{_option(recipe.depths)}: with --method {recipe.method} no student learns from a teacher, so that a "
            f"chain would be of no use. Give {_option([last])}"
        )


def _option(depths: tuple[int, ...] | list[int]) -> str:
    return f"--student-depth {','.join(map(str, depths))}"


def check_folder(bundle: Bundle, depths: tuple[int, ...]) -> None:
    """A chain that is gone on with has begun with these students: told before the first is trained.

    Raises:
        BundleError: the folder holds another run.
    """
    before = [bundle.in_chain(depth) for depth in depths[:-1]]
    there = {path.name for path in bundle.chain_path.iterdir()} if bundle.chain_path.is_dir() else set()
    at_the_last = bundle.manifest_path.exists() or bundle.checkpoints_path.exists()
    lacking = [student.path.name for student in before if not student.manifest_path.exists()]
    if (lacking and at_the_last) or there - {student.path.name for student in before}:
        by_way = f"a chain by way of depth {', '.join(sorted(there))}" if there else "one that is no such chain"
        raise BundleError(
            f"{bundle.path}: holds another run, {by_way}; it is kept. Give what that run was given, choose another "
            "folder with --out, or --overwrite it."
        )


def succession(teaching: Teaching, student: Network, path: str, manifest: Manifest) -> Teaching:
    """The student that was trained becomes the teacher.

    Args:
        student: as it began: what is taken of it is its shape.
        path: of its weights.
        manifest: of its bundle.
    """
    family = FAMILIES.get(student.spec.name)
    before = teaching.lineage
    if not before:
        deepest = depth_of(family, sections_of(teaching.network))
        before = (Ancestor(depth=deepest, sha256=manifest.teacher.sha256, metrics=manifest.metrics["teacher"]),)
    own = Ancestor(
        depth=manifest.recipe.depths[-1], sha256=manifest.student_sha256, metrics=manifest.metrics["student"]
    )
    return Teaching(
        Network(successor(student.module, path, student.spec.name), manifest.student, path),
        manifest.teacher,
        (*before, own),
        manifest.metrics["teacher"],
    )
