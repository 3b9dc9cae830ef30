"""The recipe of a run: what a file says, and what the caller says over it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.data import Data
from litdeploy.errors import NetworkError, SettingsError
from litdeploy.files import is_folder
from litdeploy.networks.registry import is_code


def resolve_recipe(recipe: Recipe | str | Path | None, changes: dict[str, Any], named: bool = True) -> Recipe:
    """The recipe with the changes over it. `data` may be just the source; `epochs` scales both phases, and
    `learning_rate` is that of the main phase.

    Args:
        named: whether the data are named; else they are the user's own objects.

    Raises:
        SettingsError: a field that there is not, or a value that it does not take.
        NetworkError: the recipe, which may be a stranger's file, names code, and the changes do not.
    """
    base = recipe if isinstance(recipe, Recipe) else read_recipe(recipe) if recipe else Recipe()
    if base.main.learning_rate or base.finetune.learning_rate:
        # Its rates are those of the optimizer and weight decay that were the defaults for every network.
        before = Recipe().filled("sgd")
        base = base.model_copy(
            update={
                "optimiser": before.optimiser if base.optimiser == "auto" else base.optimiser,
                "weight_decay": before.weight_decay if base.weight_decay is None else base.weight_decay,
            }
        )
    changes = {key: value for key, value in changes.items() if value is not None}
    student = base.indistill.student if base.indistill else None
    if student is not None and is_code(student) and "student" not in changes.get("indistill", {}):
        raise NetworkError(
            f"the recipe says indistill.student: {student!r}, which is code. It is run only when you name it: "
            f"--student-network {shlex.quote(student)}"
        )
    epochs = changes.pop("epochs", None)
    learning_rate = changes.pop("learning_rate", None)
    data = changes.pop("data", {})
    if named and not isinstance(data, str | Path | Mapping):
        raise SettingsError(
            f"data: is a {type(data).__name__}. Give the name of a dataset (a folder, file or hub id). Your own "
            "Dataset, arrays or DataLoader are taken by compress, export, verify and evaluate."
        )
    data = {"source": str(data)} if isinstance(data, str | Path) else dict(data) if named else {}
    if {"student_depth", "student_blocks"} & changes.keys():
        base = base.model_copy(update={"student_depth": None, "student_blocks": None})
    merged = base.data.merged(data)
    source = merged.get("source")
    if not named:
        merged = {"validation": base.data.validation}
    elif source is None:
        raise SettingsError(
            "no data to train on: name it with --data (a folder, a Parquet or CSV file, a hub id such as "
            "uoft-cs/cifar10, or digits), or a recipe that does."
        )
    elif Path(source).exists():
        merged["source"] = str(Path(source).resolve())
    tokenizer = merged.get("tokenizer")
    if isinstance(tokenizer, str) and is_folder(Path(tokenizer)):
        merged["tokenizer"] = str(Path(tokenizer).resolve())
    if learning_rate is not None:
        changes["main"] = {**base.main.model_dump(mode="json"), "learning_rate": learning_rate}
    resolved = base.with_(**changes, data=merged)
    if resolved.discriminator is not None:
        resolved = resolved.with_(discriminator=str(Path(resolved.discriminator).resolve()))
    if epochs is not None:
        if epochs < 1:
            raise SettingsError(f"--epochs {epochs}: at least one epoch is needed.")
        resolved = resolved.with_epochs(epochs)
    return resolved


def fitted(recipe: Recipe, data: Data, note: Callable[[str], None]) -> Recipe:
    """The recipe with what follows from the data, which the user is shown: their augmentation; and without labels the
    labels' weight, alpha, is 0."""
    if not data.labeled:
        why = (
            "they are left unused"
            if recipe.data.labels == "none"
            else f"{data.source} has none{' that are classes' * data.given}"
        )
        note(f"no labels: {why}; the student learns from its teacher alone (alpha 0)")
        recipe = recipe.with_(alpha=0.0)
    if data.noun == "image" and not data.given:
        augmentation = recipe.augmentation.filled(data.shape, data.classes)
        shown = augmentation.summary()
        if recipe.augmentation.flip is None and not augmentation.flip:
            shown += " (mirrored digits or letters are others; else --flip)"
        note(f"augmentation: {shown}")
        recipe = recipe.with_(augmentation=augmentation.model_dump())
    return recipe
