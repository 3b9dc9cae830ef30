"""The verb `compare`: every method at every depth, with the same teacher, data and epochs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdeploy.comparison.chart import accuracy_over_depth
from litdeploy.comparison.grid import Cell, Grid, cells_of
from litdeploy.comparison.page import render
from litdeploy.comparison.result import MethodComparison, Outcome, as_csv, rows_of
from litdeploy.config.recipe import Recipe
from litdeploy.errors import BundleError, SettingsError, TrainingError
from litdeploy.files import write_whole
from litdeploy.networks import Network, sections_of
from litdeploy.profiler.analysis.breakdown import break_down, name_of
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.runtime import resolve_device
from litdeploy.storage.records import TeacherRecord
from litdeploy.trainer import Progress, compress
from litdeploy.trainer.objectives import OBJECTIVES, Start
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.start import load_teacher, plan_of

DEFAULT_OUT = Path("comparison")


def compare(
    teacher: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    methods: Sequence[str] = ("scratch", "kd", "hint", "lit"),
    depths: Sequence[int],
    seeds: int = 3,
    out: str | Path = DEFAULT_OUT,
    device: str = "auto",
    train: bool = True,
    progress: Progress | None = None,
    **changes: Any,
) -> MethodComparison:
    """Trains the cells of a grid that are not there yet, and writes what all that are there come to.

    Writes `comparison.json`, `comparison.csv`, `comparison.svg` and `comparison.html` into the folder, after each cell.
    Each student learns from the teacher itself, in as many epochs as all others: a recipe's depth or chain is left out.
    Cells of the same recipe that an earlier call or another machine left in the folder are in the table too.

    Args:
        teacher: a file of weights.
        recipe: what all cells share, or its name or path; None: the defaults.
        methods: rows of `--method`.
        depths: of the students.
        seeds: how many: 0, 1, 2, …
        out: the folder.
        device: as for `compress`.
        train: False gathers what is there and trains nothing.
        progress: told of every epoch.
        **changes: fields of the recipe, as for `compress`.

    Raises:
        SettingsError: an unknown method, one that knows no depth, or a recipe that does not go with one.
        StudentError: a depth that the teacher does not allow.
        BundleError: the folder, or a cell in it, holds something else.
        InterruptedRun: the user interrupted a training; the same command goes on.
    """
    say = progress or Progress()
    grid = Grid(out, teacher, _resolved(recipe, changes, say))
    asked = cells_of(methods, depths, seeds)
    loaded, record = _begin(grid, asked)
    failed: dict[str, str] = {}
    for number, cell in enumerate(asked, start=1):
        if not train or _outcome(grid, cell, record) is not None:
            continue
        say.note(f"{cell.name} ({number} of {len(asked)})")
        try:
            _train(grid, cell, device, say)
        except TrainingError as error:
            failed[cell.name] = str(error)
            say.note(f"{cell.name}: {error}")
        _gather(grid, asked, loaded, record, failed, device)
        if cell.seed != next((later.seed for later in asked[number:]), None):
            shutil.rmtree(grid.features_path(cell.seed), ignore_errors=True)
    return _gather(grid, asked, loaded, record, failed, device)


def commands(
    teacher: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    methods: Sequence[str],
    depths: Sequence[int],
    seeds: int,
    out: str | Path = DEFAULT_OUT,
    device: str = "auto",
    progress: Progress | None = None,
    **changes: Any,
) -> list[str]:
    """One `litdeploy compress` for each cell that is not there yet, for a queue or for several machines.

    Args and errors: as for `compare`. Writes the recipe that the commands name.
    """
    grid = Grid(out, teacher, _resolved(recipe, changes, progress or Progress()))
    asked = cells_of(methods, depths, seeds)
    _, record = _begin(grid, asked)
    return [grid.command(cell, device) for cell in asked if _outcome(grid, cell, record) is None]


def _resolved(recipe: Recipe | str | Path | None, changes: dict[str, Any], progress: Progress) -> Recipe:
    resolved = resolve_recipe(recipe, changes)
    if len(resolved.depths) > 1:
        chain = ",".join(map(str, resolved.depths))
        progress.note(f"the recipe's chain {chain} is left out: here each student learns from the teacher itself")
    return resolved


def _begin(grid: Grid, cells: Sequence[Cell]) -> tuple[Network, TeacherRecord]:
    """Loads the teacher and claims the folder; a cell that would fail after hours is told at once."""
    teacher, record = load_teacher(grid.teacher, grid.recipe, None)
    assert record is not None, "a teacher from a file has one"
    if teacher.spec.translates:
        raise SettingsError(
            f"{grid.teacher}: makes images, and compare holds methods against one another by accuracy. Train each "
            f"student by itself: litdeploy compress {grid.teacher} --beta 0 --student-blocks …; its manifest tells how "
            "near its images come to the teacher's."
        )
    sections = sections_of(teacher)
    for cell in cells:
        recipe, method = grid.recipe_of(cell), OBJECTIVES[cell.method]
        if method.student == "own":
            raise SettingsError(
                f"--methods {cell.method}: its student is a network of its own, of no depth of the teacher's. Leave it "
                f"out here, and train it by itself: litdeploy compress {grid.teacher} --method {cell.method} "
                "--student-network resnet20,width=8"
            )
        plan = plan_of(teacher, sections, recipe)
        method.phases(recipe, Start(list(plan), teacher=teacher))
    grid.claim()
    return teacher, record


def _train(grid: Grid, cell: Cell, device: str, progress: Progress) -> None:
    compress(
        grid.teacher,
        recipe=grid.recipe_of(cell),
        out=grid.bundle(cell).path,
        device=device,
        resume=True,
        feature_cache_dir=grid.features_path(cell.seed),
        progress=progress,
    )


def _outcome(grid: Grid, cell: Cell, teacher: TeacherRecord) -> Outcome | None:
    """What the cell came to; None where it is not whole yet.

    Raises:
        BundleError: there is another run in its place.
    """
    bundle = grid.bundle(cell)
    if not bundle.manifest_path.exists():
        return None
    manifest = bundle.read()
    # The data's path may be another on another machine; its fingerprint is held against the other cells'.
    same = _without_source(manifest.recipe) == _without_source(grid.recipe_of(cell))
    if not same or manifest.teacher.sha256 != teacher.sha256:
        raise BundleError(
            f"{bundle.path}: holds another run (another {'teacher' if same else 'recipe'}); it is kept. Choose another "
            "folder with --out, or remove it."
        )
    if manifest.status != "complete":
        return None
    student = manifest.metrics["student"]
    return Outcome(
        method=cell.method,
        depth=cell.depth,
        seed=cell.seed,
        validation=student["validation"],
        test=student["test"],
        seconds=manifest.run.seconds,
        epochs=manifest.run.epochs,
        images=manifest.data.images["train"],
        device=manifest.run.device,
        student_sha256=manifest.student_sha256,
    )


def _without_source(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": None})})


def _gather(
    grid: Grid, asked: Sequence[Cell], teacher: Network, record: TeacherRecord, failed: dict[str, str], device: str
) -> MethodComparison:
    """Writes the table of all cells that are there."""
    outcomes = {}
    for cell in sorted({*asked, *grid.found()}):
        found = _outcome(grid, cell, record)
        if found is not None:
            outcomes[cell] = found
    manifests = {cell: grid.bundle(cell).read() for cell in outcomes}
    data = {manifest.data.fingerprint: manifest.data for manifest in manifests.values()}
    if len(data) > 1:
        raise BundleError(
            f"{grid.path}: its cells were trained on different data ({', '.join(cell.name for cell in outcomes)}). "
            "Remove those of the wrong data, and call again."
        )
    sections = [section.name for section in sections_of(teacher)]
    tested = [manifest.metrics["teacher"]["test"] for manifest in manifests.values()]
    result = MethodComparison(
        teacher=record,
        teacher_name=name_of(teacher, break_down(teacher, sections)),
        teacher_accuracy=tested[0] if tested else None,
        data=next(iter(data.values()), None),
        recipe=grid.recipe,
        rows=rows_of(list(outcomes.values())),
        outcomes=tuple(outcomes.values()),
        missing=tuple(grid.command(cell, device) for cell in asked if cell not in outcomes),
        failed=failed,
        environment=current_environment(resolve_device(device)),
    )
    _write(result, grid.path)
    return result


def _write(result: MethodComparison, folder: Path) -> None:
    """The page last: it is made of the others."""
    figure = accuracy_over_depth(result)
    texts = {
        "comparison.json": result.model_dump_json(indent=2),
        "comparison.csv": as_csv(result.outcomes),
        "comparison.svg": figure.alone if figure else None,
        "comparison.html": render(result, figure.inline if figure else None),
    }
    for name, text in texts.items():
        if text is not None:
            with write_whole(folder / name) as temporary:
                temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
