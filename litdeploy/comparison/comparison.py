"""The verb `compare`: every method at every depth, with the same teacher, data and epochs: a grid of cells."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litdeploy.comparison.report import MethodComparison, Outcome, accuracy_over_depth, as_csv, render, rows_of
from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.data import open_data
from litdeploy.errors import BundleError, SettingsError, TrainingError
from litdeploy.files import is_partial, remove_partial, write_whole
from litdeploy.networks import Network, sections_of
from litdeploy.profiler.analysis.breakdown import break_down, name_of
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.runtime import resolve_device
from litdeploy.storage.bundle import Bundle, remove_files
from litdeploy.storage.records import TeacherRecord
from litdeploy.tasks import task_of
from litdeploy.trainer import Callback, compress
from litdeploy.trainer.methods import METHODS, Start
from litdeploy.trainer.optimizer import with_optimizer
from litdeploy.trainer.plan import depth_plan
from litdeploy.trainer.progress import callbacks_of
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.teacher import read_teacher

DEFAULT_OUT = Path("comparison")

# What a cell sets itself, in addition to the method; the rest of the recipe is the same for all.
_OF_A_CELL = {"student_depth", "student_blocks", "seed"}


@dataclass(frozen=True, order=True)
class GridCell:
    """One student: a seed, a depth and a method. Cells are trained in this order, since all cells of a seed share the
    cached features of the teacher."""

    seed: int
    depth: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.depth}-{self.seed}"

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the recipe that the cell sets."""
        return {"method": self.method, "student_depth": self.depth, "student_blocks": None, "seed": self.seed}


class Grid:
    """A folder of cells that share a teacher and a recipe.

    recipe.yaml      the recipe that all cells share
    cells/NAME/      the bundle of each
    features/SEED/   the teacher's cached features, until the seed's last cell is trained
    """

    def __init__(self, path: str | Path, teacher: str | Path, recipe: Recipe) -> None:
        """
        Args:
            teacher: its weights.
            recipe: shared by all cells; a cell replaces its method, depth and seed. Settings of a method apply to that
                method's cells.
        """
        self.path = Path(path)
        self.teacher = Path(teacher)
        self.recipe = Recipe.model_validate_json(recipe.model_dump_json(exclude=_OF_A_CELL))

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    def claim(self) -> None:
        """Write the recipe into the folder, or compare it with the one that is there.

        Raises:
            BundleError: the folder holds cells of another recipe.
        """
        if self.recipe_path.exists():
            before = read_recipe(self.recipe_path)
            if before != self.recipe:
                raise BundleError(
                    f"{self.path}: holds cells of another recipe ({', '.join(_differing(before, self.recipe))} "
                    "differ); they are kept. Choose another folder with --out."
                )
            return
        others = [path for path in self.path.iterdir() if not is_partial(path.name)] if self.path.is_dir() else []
        if others:
            raise BundleError(
                f"{self.path}: holds files that are not of a comparison. Choose another folder with --out."
            )
        remove_partial(self.path)  # of a call that was killed while it wrote the recipe
        with write_whole(self.recipe_path) as temporary:
            values = self.recipe.model_dump(mode="json", exclude=_OF_A_CELL)
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def bundle(self, cell: GridCell) -> Bundle:
        return Bundle(self.path / "cells" / cell.name)

    def features_path(self, seed: int) -> Path:
        """Folder of cached features: one for each seed, since seeds hold out different images."""
        return self.path / "features" / str(seed)

    def tidy(self, cells: Sequence[GridCell]) -> None:
        """Remove what killed calls left: unfinished files, checkpoints of finished cells, and the features of seeds of
        which each of these cells is finished."""
        remove_partial(self.path)
        open_seeds = set()
        for cell in cells:
            bundle = self.bundle(cell)
            if bundle.manifest_path.is_file() and bundle.read().status == "complete":
                remove_files(bundle.checkpoints_path, "checkpoints")
            else:
                open_seeds.add(cell.seed)
        for seed in {cell.seed for cell in cells} - open_seeds:
            remove_files(self.features_path(seed), "features")

    def recipe_of(self, cell: GridCell) -> Recipe:
        """The recipe of one cell.

        Raises:
            SettingsError: it does not fit the cell's method.
        """
        return self.recipe.with_(**cell.changes)

    def command(self, cell: GridCell, device: str = "auto") -> str:
        """The command that trains this cell alone, on this machine or on another that has the folder."""
        arguments = [
            "litdeploy",
            "compress",
            str(self.teacher),
            "--recipe",
            str(self.recipe_path),
            "--method",
            cell.method,
            "--student-depth",
            str(cell.depth),
            "--seed",
            str(cell.seed),
            "--feature-cache-dir",
            str(self.features_path(cell.seed)),
            *(() if device == "auto" else ("--device", device)),
            "--out",
            str(self.bundle(cell).path),
            "--resume",
        ]
        return shlex.join(arguments)

    def found(self) -> Iterator[GridCell]:
        """Cells whose bundles exist, complete or not."""
        for path in sorted((self.path / "cells").glob("*-*-*")):
            method, depth, seed = path.name.rsplit("-", 2)
            if depth.isdecimal() and seed.isdecimal():
                yield GridCell(int(seed), int(depth), method)


def cells_of(methods: Sequence[str], depths: Sequence[int], seeds: int) -> list[GridCell]:
    """Every method at every depth with seeds 0 to `seeds` − 1, in the order of training.

    Raises:
        SettingsError: there is none.
    """
    if not methods or not depths or seeds < 1:
        raise SettingsError("nothing to compare: name methods, depths and at least one seed, as in --seeds 3.")
    return sorted({GridCell(seed, depth, method) for method in methods for depth in depths for seed in range(seeds)})


def _differing(before: Recipe, now: Recipe) -> list[str]:
    old, new = before.model_dump(), now.model_dump()
    return [name for name in old if old[name] != new[name]]


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
    progress: Callback | bool = True,
    **changes: Any,
) -> MethodComparison:
    """Train the missing cells of a grid, and write a report on all cells.

    Writes `comparison.json`, `comparison.csv`, `comparison.svg` and `comparison.html` into the folder, after each cell.
    Each student learns from the teacher itself, in the same number of epochs: a recipe's depth or chain is ignored.
    Cells of the same recipe from an earlier call or another machine are in the report too.

    Args:
        teacher: a file of weights.
        recipe: shared by all cells; a recipe, its name or its path; None: the defaults.
        methods: rows of `--method`.
        depths: of the students.
        seeds: number of seeds: 0, 1, 2, …
        out: the folder.
        device: as for `compress`.
        train: False: only report on the cells that are there.
        progress: as for `compress`.
        **changes: fields of the recipe, as for `compress`.

    Raises:
        SettingsError: an unknown method, one without depths, or a recipe that does not fit one.
        StudentError: a depth that the teacher does not allow.
        BundleError: the folder, or a cell in it, holds another run.
        InterruptedRun: the user interrupted a training; the same command resumes it.
    """
    say = callbacks_of(progress)
    grid = Grid(out, teacher, _resolved(recipe, changes, say))
    asked = cells_of(methods, depths, seeds)
    loaded, record = _begin(grid, asked, say.note)
    grid.tidy(asked)
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
        grid.tidy(asked)
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
    progress: Callback | bool = True,
    **changes: Any,
) -> list[str]:
    """One `litdeploy compress` command for each missing cell, for a queue or for several machines.

    Arguments and errors as for `compare`. Writes the recipe that the commands name.
    """
    say = callbacks_of(progress)
    grid = Grid(out, teacher, _resolved(recipe, changes, say))
    asked = cells_of(methods, depths, seeds)
    _, record = _begin(grid, asked, say.note)
    return [grid.command(cell, device) for cell in asked if _outcome(grid, cell, record) is None]


def _resolved(recipe: Recipe | str | Path | None, changes: dict[str, Any], progress: Callback) -> Recipe:
    resolved = resolve_recipe(recipe, changes)
    if len(resolved.depths) > 1:
        chain = ",".join(map(str, resolved.depths))
        progress.note(f"the recipe's chain {chain} is ignored: here each student learns from the teacher itself")
    return resolved


def _begin(grid: Grid, cells: Sequence[GridCell], note: Callable[[str], None]) -> tuple[Network, TeacherRecord]:
    """Load the teacher, fill in the recipe for it, check every cell so that none fails after hours, and claim the
    folder."""
    teacher, record = read_teacher(grid.teacher, grid.recipe, None)
    grid.recipe = with_optimizer(grid.recipe, teacher.module, note)
    assert record is not None, "a teacher from a file has one"
    task = task_of(teacher.spec)
    if not task.labeled:
        raise SettingsError(
            f"{grid.teacher}: {task.makes}, and compare ranks methods by accuracy. Train each student by itself: "
            f"litdeploy compress {grid.teacher} --beta 0 --student-blocks …; its manifest has its {task.measure} to "
            "the teacher."
        )
    sections = sections_of(teacher)
    for cell in cells:
        recipe, method = grid.recipe_of(cell), METHODS[cell.method]
        if method.student == "own":
            raise SettingsError(
                f"--methods {cell.method}: its student is a network of its own, of no depth of the teacher's. Leave it "
                f"out here, and train it by itself: litdeploy compress {grid.teacher} --method {cell.method} "
                "--student-network resnet20,width=8"
            )
        plan = depth_plan(teacher, sections, recipe)
        method.phases(recipe, Start(list(plan), teacher=teacher))
    grid.claim()
    return teacher, record


def _train(grid: Grid, cell: GridCell, device: str, progress: Callback) -> None:
    data = open_data(grid.recipe.data, resolve_device("cpu"), cell.seed)
    if not data.labeled:
        raise SettingsError(
            f"{data.source}: has no labels, or they are not used, and compare ranks methods by accuracy. Train each "
            f"student by itself: litdeploy compress {grid.teacher} --student-depth N --data {data.source}"
        )
    compress(
        grid.teacher,
        recipe=grid.recipe_of(cell),
        out=grid.bundle(cell).path,
        device=device,
        resume=True,
        feature_cache_dir=grid.features_path(cell.seed),
        progress=progress,
    )


def _outcome(grid: Grid, cell: GridCell, teacher: TeacherRecord) -> Outcome | None:
    """The cell's result; None if it is not complete yet.

    Raises:
        BundleError: its folder holds another run.
    """
    bundle = grid.bundle(cell)
    if not bundle.manifest_path.exists():
        return None
    manifest = bundle.read()
    asked = grid.recipe_of(cell)
    filled = asked.filled_as(manifest.recipe, manifest.data.labeled)
    # The data's path may differ on another machine; `_gather` compares the fingerprints of all cells.
    same = _without_source(manifest.recipe) == _without_source(filled)
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
    grid: Grid, asked: Sequence[GridCell], teacher: Network, record: TeacherRecord, failed: dict[str, str], device: str
) -> MethodComparison:
    """Report on all cells that are there."""
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
    tested = [manifest.metrics["teacher"]["test"] for manifest in manifests.values()]
    result = MethodComparison(
        teacher=record,
        teacher_name=name_of(teacher, break_down(teacher, sections_of(teacher))),
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
    """Write the result in all forms, the page last."""
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
