"""The options that are generated from the recipe's fields."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import litdeploy
from litdeploy.cli.recipe_options import FIELDS, OF_A_GRID, OF_A_STUDENT, PANELS, WITHOUT, changes
from litdeploy.config.recipe import Recipe
from litdeploy.errors import SettingsError
from litdeploy.trainer.resolve import resolve_recipe
from tests.cli.conftest import Run

# Command → the recipe's options that it has no use for.
LACKING: dict[str, set[str]] = {
    "compress": set(),
    "deploy": set(),
    "train": OF_A_STUDENT,  # and `network` is its argument
    "compare": OF_A_GRID,
}


def parameters(command: str) -> set[str]:
    return set(inspect.signature(import_module(f"litdeploy.cli.{command}").command).parameters)


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that are values and not settings of their own."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield from fields(nested[0], f"{prefix}{name}.") if nested else [prefix + name]


@pytest.mark.parametrize("command", LACKING)
def test_the_commands_have_the_same_options_of_the_recipe(command: str) -> None:
    assert FIELDS.keys() - parameters(command) == LACKING[command]


def test_commands_on_a_student_lack_no_option_of_one_another() -> None:
    assert parameters("deploy") - parameters("compress") == {"target"}
    assert parameters("compress") <= parameters("deploy")


def test_every_field_has_an_option_or_is_known_to_have_none() -> None:
    of_options = {field for field in FIELDS.values() if field not in {"epochs", "learning_rate"}}
    assert not of_options & WITHOUT
    assert of_options | WITHOUT == set(fields())


def test_names_are_not_used_twice() -> None:
    assert len(FIELDS) == sum(map(len, PANELS.values()))


def test_every_option_is_described(run: Run) -> None:
    printed = " ".join(run("compress", "--help").out.replace("│", "").split())
    for name in FIELDS:
        assert f"--{name.replace('_', '-')} " in printed
    assert "Random seed for initialization, order and augmentation." in printed.replace("  ", " ")


def test_every_option_reaches_its_field(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "student_depth": ("17,9", [17, 9]),
        "data": ("digits", "digits"),
        "image_column": ("a", "a"),
        "attributes": ("a, b", ["a", "b"]),
        "image_size": ("32,48", [32, 48]),
        "resident": (None, True),
        "workers": ("3", 3),
        "input_shape": ("3,32,32", (3, 32, 32)),
        "feature_cache": ("4", 4),
        "temperature": ("2.5", 2.5),
        "parallel": ("data", "data"),
        "optimiser": ("adamw", "adamw"),
        "epochs": ("7", 7),
        "learning_rate": ("0.05", 0.05),
        "by": ("lit", "lit"),
        "student_network": ("resnet8", "resnet8"),
        "sparsity": ("1e-3", 1e-3),
    }
    received: dict[str, Any] = {}

    def compress(teacher: object, **options: Any) -> None:
        received.update(options)
        raise SettingsError("far enough")

    monkeypatch.setattr(litdeploy, "compress", compress, raising=False)
    line = [
        word
        for name, (text, _) in given.items()
        for word in (f"--{name.replace('_', '-')}", *([] if text is None else [text]))
    ]
    assert "far enough" in run("compress", "t.pt", *line).err
    for name, (_, value) in given.items():
        into = received
        for key in FIELDS[name].split("."):
            into = into[key]
        assert into == value, name


def test_options_that_were_not_given_change_nothing() -> None:
    assert changes(dict.fromkeys(FIELDS)) == {}
    recipe = resolve_recipe("digits-resnet", changes({**dict.fromkeys(FIELDS), "temperature": 9.0, "validation": 0.2}))
    assert (recipe.temperature, recipe.data.validation, recipe.data.source) == (9.0, 0.2, "digits")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("student_depth", "8,", "--student-depth 8,: whole numbers of at least 1 are needed, as in 20, or 17,9"),
        ("student_blocks", "layer1", "--student-blocks layer1: write section=blocks, as in layer1=3"),
        ("input_shape", "8,x", "--input-shape 8,x: whole numbers"),
        ("image_size", "8", "--image-size 8: 2 whole numbers"),
    ],
)
def test_a_text_that_is_written_otherwise(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        changes({name: text})
    assert message in str(caught.value)
