"""The options that are generated from the fields of `Recipe`: one table, the same options on every command."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, NamedTuple, get_args

import typer
from pydantic import BaseModel

from litdeploy.cli import options as o
from litdeploy.config.recipe import Recipe
from litdeploy.errors import SettingsError


def _depths(text: str) -> list[int]:
    return list(o.whole_numbers(text, "--student-depth", "20, or 17,9 for a chain"))


def _blocks(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(count) for name, count in pairs}
    except ValueError:
        raise SettingsError(
            f"--student-blocks {text}: write section=blocks, as in layer1=3,layer3=2; `litdeploy inspect` lists the "
            "sections."
        ) from None


def _shape(text: str) -> tuple[int, ...]:
    return o.whole_numbers(text, "--input-shape", "3,32,32 (a text: 128; a signal: 1,16000)")


def _size(text: str) -> list[int]:
    return list(o.whole_numbers(text, "--image-size", "32,32", 2))


def _count(text: str) -> int | str:
    return int(text) if text.isdecimal() else text  # words are checked by the recipe


class _Text(NamedTuple):
    """How the text of an option is written and read whose field is neither a number nor a word."""

    metavar: str
    read: Callable[[str], Any]


# Panel of --help → its fields, dotted for those of nested settings. The panel "Options" comes first.
PANELS: dict[str, tuple[str, ...]] = {
    "Options": ("student_depth", "data.source", "method", "epochs", "batch_size", "learning_rate", "seed"),
    "Student": (
        "student_blocks",
        "blocks",
        "sections",
        "init",
        "born_again.generations",
        "born_again.by",
        "indistill.student",
        "slimming.sparsity",
        "slimming.prune_ratio",
    ),
    "Network": ("network", "pooling", "normalise", "input_shape", "task"),
    "Data": (
        "data.image_column",
        "data.text_column",
        "data.label_column",
        "data.labels",
        "data.attributes",
        "data.image_size",
        "data.text_length",
        "data.tokenizer",
        "data.validation",
        "data.skip_bad",
        "data.resident",
        "data.workers",
    ),
    "Distillation": (
        "beta",
        "alpha",
        "temperature",
        "section_weight",
        "hint_share",
        "discriminator",
        "domain_weight",
        "cycle_weight",
        "teacher_weight",
        "feature_cache",
    ),
    "Training": (
        "optimiser",
        "momentum",
        "weight_decay",
        "keep",
        "augmentation.flip",
        "augmentation.padding",
        "precision",
        "compile",
        "batch_norm",
        "parallel",
    ),
}

# Not fields, but accepted by the verbs like one: each sets fields of the phases.
_OF_PHASES: dict[str, tuple[type, str]] = {
    "epochs": (int, "Epochs of both phases together."),
    "learning_rate": (float, "Highest learning rate of the main phase."),
}

# Fields without an option of their own: a recipe's file sets them.
WITHOUT = {
    "main.epochs",
    "main.learning_rate",
    "main.schedule",
    "main.milestones",
    "finetune.epochs",
    "finetune.learning_rate",
    "finetune.schedule",
    "finetune.milestones",
    "betas",
    "indistill.share",
    "indistill.then",
    "indistill.pkt_weight",
    "indistill.label_weight",
}

# Field → its option, if that is not the field's own name.
_NAMES = {"data.source": "data", "indistill.student": "student_network"}

_TEXTS = {
    "student_depth": _Text("N[,N…]", _depths),
    "student_blocks": _Text("NAME=N,…", _blocks),
    "input_shape": _Text("C,H,W", _shape),
    "data.attributes": _Text("A,B,…", o.words),
    "data.image_size": _Text("H,W", _size),
    "feature_cache": _Text("off|auto|N", _count),
    "sections": _Text("auto|N", _count),
}

# The names of the methods would fill the column of --help; the description has them.
_METAVARS = {"method": "NAME"} | {field: text.metavar for field, text in _TEXTS.items()}


def _name(field: str) -> str:
    return _NAMES.get(field, field.rpartition(".")[2])


FIELDS = {_name(field): field for fields in PANELS.values() for field in fields}

# Options of a student and of how it learns from a teacher, for commands without one.
OF_A_STUDENT = {
    "student_depth",
    "method",
    "parallel",
    *(_name(field) for panel in ("Student", "Distillation") for field in PANELS[panel]),
}

OF_DATA = {"data", *map(_name, PANELS["Data"])}

# Options that `compare` sets for each student itself, or that are for one method alone.
OF_A_GRID = {"student_depth", "method", "seed", *map(_name, PANELS["Student"])} - {"init"}


def recipe_options(
    only: Collection[str] | None = None, *, without: Collection[str] = ()
) -> Callable[[o.Command], o.Command]:
    """Add options of the recipe to a command, which receives them in its `**` parameter and passes them to `changes`.

    Args:
        only: parameter names of the options; None: all.
        without: names to leave out.
    """
    names = [name for name in FIELDS if (only is None or name in only) and name not in without]

    def extend(command: o.Command) -> o.Command:
        return o.with_options(command, {name: _annotation(FIELDS[name]) for name in names})

    return extend


def changes(given: dict[str, Any]) -> dict[str, Any]:
    """Arrange the values of recipe options as the verbs take them: by field, nested settings as mappings.

    Raises:
        SettingsError: a text that is not written as its field needs it.
    """
    arranged: dict[str, Any] = {}
    for name, value in given.items():
        field = FIELDS[name]
        if value is None:
            continue
        *outer, last = field.split(".")
        into = arranged
        for each in outer:
            into = into.setdefault(each, {})
        into[last] = _TEXTS[field].read(value) if field in _TEXTS else value
    return arranged


def _annotation(field: str) -> Any:
    """The parameter's annotation for typer: its type, and its option with help, panel and form."""
    kind, description = _OF_PHASES.get(field) or _described(field)
    text = _TEXTS.get(field)
    panel = next(panel for panel, fields in PANELS.items() if field in fields)
    option = typer.Option(help=description, metavar=_METAVARS.get(field), rich_help_panel=panel)
    return Annotated[(str if text else kind) | None, option]


def _described(field: str) -> tuple[Any, str]:
    """The field's type and description."""
    model: type[BaseModel] = Recipe
    *outer, last = field.split(".")
    for name in outer:
        annotation = model.model_fields[name].annotation
        kinds = (annotation, *get_args(annotation))  # the settings of a method may be None
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    found = model.model_fields[last]
    assert found.description, f"{field}: a field of the recipe that is an option needs a description"
    return found.annotation, found.description
