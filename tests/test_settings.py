from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy import settings
from litdeploy.errors import SettingsError
from litdeploy.recipe import Recipe, read_recipe
from litdeploy.target import Target, read_target


@pytest.mark.parametrize("name", settings.names("recipes"))
def test_every_recipe_that_ships_is_read(name: str) -> None:
    assert read_recipe(name).epochs >= 1


@pytest.mark.parametrize("name", settings.names("profiles"))
def test_every_target_that_ships_is_read(name: str) -> None:
    assert read_target(name).batch_sizes


def test_recipes_and_targets_ship() -> None:
    assert {"cifar10-resnet", "cifar10-resnet-paper", "digits-resnet"} <= set(settings.names("recipes"))
    assert {"cpu", "cuda"} <= set(settings.names("profiles"))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("alpha: 0.5\nbeda: 0.5\n", 2, "unknown key 'beda'. Did you mean 'beta'?"),
        ("alpha: 0.5\n\nmain:\n  epochs: 3\n  learning_rat: 1\n", 5, "Did you mean 'learning_rate'?"),
        ("alpha: high\n", 1, "alpha: input should be a valid number (found 'high')"),
        ("seed: 0\nalpha: 2\n", 2, "less than or equal to 1"),
        ("method: lot\n", 1, "'lit', 'kd', 'hint' or 'scratch'"),
        ("alpha: [\n", 2, "not valid YAML"),
        ("epochs: !!python/object/apply:os.system ['true']\n", 1, "not valid YAML"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_recipe(path)
    assert f"mine.yaml line {line}" in str(caught.value)
    assert message in str(caught.value)


def test_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weight_decay: 1e-4\n")
    assert read_recipe(path).weight_decay == 1e-4


def test_a_list_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- 1\n")
    with pytest.raises(SettingsError, match="holds a list"):
        read_recipe(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="cifar10-resnet"):
        read_recipe("cifar1000")


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("main: {epochs: 0, learning_rate: 0.1}\nfinetune: {epochs: 0, learning_rate: 0.1}\n")
    with pytest.raises(SettingsError, match="nothing would be trained"):
        read_recipe(path)


def test_epochs_scale_both_phases_and_their_milestones() -> None:
    paper = read_recipe("cifar10-resnet-paper")
    tenth = paper.with_epochs(30)
    assert (tenth.main.epochs, tenth.finetune.epochs) == (18, 12)
    assert (tenth.main.milestones, tenth.finetune.milestones) == ((10,), (6,))
    assert paper.with_epochs(300) == paper


def test_two_ways_to_say_the_student_are_refused() -> None:
    with pytest.raises(SettingsError, match="keep one"):
        settings.parse(Recipe, {"student_depth": 20, "student_blocks": {"layer1": 3}}, "here")


def test_a_target_sorts_its_batch_sizes() -> None:
    assert settings.parse(Target, {"batch_sizes": [8, 1, 8]}, "here").batch_sizes == (1, 8)
    with pytest.raises(SettingsError, match="at least 1"):
        settings.parse(Target, {"batch_sizes": [0]}, "here")
