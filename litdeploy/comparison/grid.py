"""What is trained: a grid of methods, depths and seeds over one recipe, one bundle a cell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import write_whole
from litdeploy.storage.bundle import Bundle

# What a cell sets itself, beside the method; the rest of the recipe is the same for all.
_OF_A_CELL = {"student_depth", "student_blocks", "seed"}


@dataclass(frozen=True, order=True)
class Cell:
    """One student: a seed, a depth and a method. In this order cells are trained, as what is kept of the teacher's
    features serves all cells of a seed."""

    seed: int
    depth: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.depth}-{self.seed}"

    @property
    def changes(self) -> dict[str, Any]:
        """What it sets in the recipe."""
        return {"method": self.method, "student_depth": self.depth, "student_blocks": None, "seed": self.seed}


class Grid:
    """A folder of cells that share a teacher and a recipe.

    recipe.yaml      the recipe that all cells share
    cells/NAME/      the bundle of each
    features/SEED/   what is kept of the teacher's features until the seed's last cell is trained
    """

    def __init__(self, path: str | Path, teacher: str | Path, recipe: Recipe) -> None:
        """
        Args:
            teacher: its weights.
            recipe: of which a cell's method, depth and seed replace those that are there; its settings of a method are
                for the cells of that one.
        """
        self.path = Path(path)
        self.teacher = Path(teacher)
        self.recipe = Recipe.model_validate_json(recipe.model_dump_json(exclude=_OF_A_CELL))

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    def claim(self) -> None:
        """Writes the recipe into the folder, or holds it against the one that is there.

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
        if self.path.is_dir() and any(self.path.iterdir()):
            raise BundleError(
                f"{self.path}: holds files that are not a comparison's. Choose another folder with --out."
            )
        with write_whole(self.recipe_path) as temporary:
            values = self.recipe.model_dump(mode="json", exclude=_OF_A_CELL)
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def bundle(self, cell: Cell) -> Bundle:
        return Bundle(self.path / "cells" / cell.name)

    def features_path(self, seed: int) -> Path:
        """Seeds hold out other images, so that each has features of its own."""
        return self.path / "features" / str(seed)

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of one cell.

        Raises:
            SettingsError: it does not go with the cell's method.
        """
        return self.recipe.with_(**cell.changes)

    def command(self, cell: Cell, device: str = "auto") -> str:
        """What trains the cell by itself, on this machine or on another that sees the folder."""
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

    def found(self) -> Iterator[Cell]:
        """The cells whose bundles are there, whole or not."""
        for path in sorted((self.path / "cells").glob("*-*-*")):
            method, depth, seed = path.name.rsplit("-", 2)
            if depth.isdecimal() and seed.isdecimal():
                yield Cell(int(seed), int(depth), method)


def cells_of(methods: Sequence[str], depths: Sequence[int], seeds: int) -> list[Cell]:
    """Every method at every depth with seeds 0 to `seeds` − 1, in the order of training.

    Raises:
        SettingsError: there is none.
    """
    if not methods or not depths or seeds < 1:
        raise SettingsError("nothing to compare: name methods, depths and at least one seed, as in --seeds 3.")
    return sorted({Cell(seed, depth, method) for method in methods for depth in depths for seed in range(seeds)})


def _differing(before: Recipe, now: Recipe) -> list[str]:
    old, new = before.model_dump(), now.model_dump()
    return [name for name in old if old[name] != new[name]]
