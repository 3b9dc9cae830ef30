from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.config import settings
from litdeploy.config.recipe import Augmentation, DataSettings, Phase, Recipe, read_recipe
from litdeploy.config.target import Target, read_target
from litdeploy.errors import SettingsError
from litdeploy.networks import FAMILIES, find_sections, new
from litdeploy.networks.student import plan_for_depth

# Recipe → the teacher that it is for.
PAIRS = {
    "cifar10-resnet110-20": "resnet110",
    "cifar10-resnet110-32": "resnet110",
    "cifar100-resnet110-32": "resnet110",
    "cifar10-resnext110-20": "resnext110,cardinality=1,width=4,out_width=4",
}


@pytest.mark.parametrize("name", settings.names("recipes"))
def test_every_recipe_that_ships_is_read(name: str) -> None:
    assert read_recipe(name).epochs >= 1


@pytest.mark.parametrize("name", settings.names("profiles"))
def test_every_target_that_ships_is_read(name: str) -> None:
    assert read_target(name).batch_sizes


def test_recipes_and_targets_ship() -> None:
    assert {"cifar10-resnet", *PAIRS, "digits-resnet"} <= set(settings.names("recipes"))
    assert {"cpu", "cuda"} <= set(settings.names("profiles"))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("alpha: 0.5\nbeda: 0.5\n", 2, "unknown key 'beda'. Did you mean 'beta'?"),
        ("alpha: 0.5\n\nmain:\n  epochs: 3\n  learning_rat: 1\n", 5, "Did you mean 'learning_rate'?"),
        ("alpha: high\n", 1, "alpha: input should be a valid number (found 'high')"),
        ("seed: 0\nalpha: 2\n", 2, "less than or equal to 1"),
        ("method: lot\n", 1, "'lit', 'kd', 'hint', 'scratch'"),
        ("alpha: [\n", 2, "not valid YAML"),
        ("seed: 1\nseed: 2\n", 2, "the key 'seed' is given twice"),
        ("main: {epochs: 1, learning_rate: 0.1, epochs: 2}\n", 1, "the key 'epochs' is given twice"),
        ("alpha: 0.5\nseed: 1:04\n", 2, "valid integer (found '1:04')"),
        ("batch_size: 1_000\n", 1, "valid integer (found '1_000')"),
        ("network: 2026-11-24\nseed: yes\n", 2, "valid integer (found 'yes')"),
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


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 010\nbatch_size: 0x20\nbeta: .5\nfeature_cache: off\nnetwork: ~\n")
    recipe = read_recipe(path)
    assert (recipe.seed, recipe.batch_size, recipe.beta, recipe.feature_cache) == (10, 32, 0.5, "off")
    assert recipe.network is None


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
    paper = read_recipe("cifar10-resnet:paper")
    tenth = paper.with_epochs(30)
    assert (tenth.main.epochs, tenth.finetune.epochs) == (18, 12)
    assert (tenth.main.milestones, tenth.finetune.milestones) == ((10,), (6,))
    assert paper.with_epochs(300) == paper


@pytest.mark.parametrize(("name", "teacher"), PAIRS.items())
def test_a_recipe_for_a_pair_has_published_settings_and_a_student_that_there_is(name: str, teacher: str) -> None:
    default, paper = read_recipe(name), read_recipe(f"{name}:paper")
    own = {"data": default.data, "normalise": default.normalise, "student_depth": default.student_depth}
    assert default == read_recipe("cifar10-resnet").model_copy(update=own)
    assert (paper.main.epochs, paper.finetune.epochs, paper.batch_size, paper.init) == (175, 125, 32, "fresh")
    assert (paper.data, paper.student_depth) == (default.data, default.student_depth)
    made = new(teacher, normalise=default.normalise, input_shape=(3, 32, 32), classes=10, seed=0)
    sections = find_sections(made.module, made.example())
    plan = plan_for_depth(sections, default.student_depth or 0, FAMILIES[made.spec.name])
    assert {len(blocks) for blocks in plan.values()} == {int(name[-2:]) // (9 if "next" in name else 6)}


def test_the_recipe_for_texts_is_a_chain_with_the_published_loss() -> None:
    paper = read_recipe("amazon-full-vdcnn29-9:paper")
    assert (paper.alpha, paper.beta, paper.temperature, paper.batch_size) == (0.95, 0.05, 6.0, 128)
    assert paper.section_weight == 1
    assert paper.depths == read_recipe("amazon-full-vdcnn29-9").depths == (17, 9)


def test_a_chain_is_its_depths_and_one_depth_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("student_depth: [20]\n")
    assert read_recipe(tmp_path / "a.yaml") == Recipe(student_depth=20)
    chain = Recipe(student_depth=(17, 9))
    assert Recipe.model_validate_json(chain.model_dump_json()) == chain
    assert (chain.with_(student_depth=9).depths, Recipe().depths) == ((9,), ())
    for wrong in ([], [0, 1], [True], "deep", 2.5):
        with pytest.raises(SettingsError, match="a depth is a whole number of at least 1"):
            Recipe().with_(student_depth=wrong)


VARIED = """\
data: {source: digits, validation: 0.2}
main: {epochs: 9, learning_rate: 0.1}
paper:
  data: {validation: 0.1}
  main:
    epochs: 175
    milestones: [100]
    schedule: step
  alpha: 0.95
"""


def test_the_paper_settings_are_laid_over_the_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(VARIED)
    default, paper = read_recipe(path), read_recipe(f"{path}:paper")
    assert default == Recipe(
        data=DataSettings(source="digits", validation=0.2), main=Phase(epochs=9, learning_rate=0.1)
    )
    main = Phase(epochs=175, learning_rate=0.1, schedule="step", milestones=(100,))
    assert paper == Recipe(data=DataSettings(source="digits", validation=0.1), main=main, alpha=0.95)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    epochs: 175", "    epoch: 175", "line 6: unknown key 'main.epoch'. Did you mean 'epochs'?"),
        ("alpha: 0.95", "alpha: 2", "line 9: alpha: input should be less"),
        ("learning_rate: 0.1", "learning_rate: 0", "line 2: main.learning_rate: input should be greater"),
        ("  alpha: 0.95", "  paper: {}", "line 9: unknown key 'paper'"),
    ],
)
def test_a_fault_in_the_paper_settings_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(VARIED.replace(old, new))
    with pytest.raises(SettingsError) as caught:
        read_recipe(f"{path}:paper")
    assert f"mine.yaml {message}" in str(caught.value)


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'papr'. Name cifar10-resnet or cifar10-resnet:paper\."):
        read_recipe("cifar10-resnet:papr")
    with pytest.raises(SettingsError, match=r"'paper'\. Name digits-resnet\."):
        read_recipe("digits-resnet:paper")
    path = tmp_path / "mine.yaml"
    path.write_text("alpha: 0.5\npaper: 3\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml line 2: 'paper' must be a mapping"):
        read_recipe(path)


def test_a_colon_in_a_files_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine:paper"
    path.write_text("alpha: 0.5\n")
    assert read_recipe(path).alpha == 0.5


def test_two_ways_to_say_the_student_are_refused() -> None:
    with pytest.raises(SettingsError, match="keep one"):
        settings.parse(Recipe, {"student_depth": 20, "student_blocks": {"layer1": 3}}, "here")


def test_a_target_sorts_its_batch_sizes() -> None:
    assert settings.parse(Target, {"batch_sizes": [8, 1, 8]}, "here").batch_sizes == (1, 8)
    with pytest.raises(SettingsError, match="at least 1"):
        settings.parse(Target, {"batch_sizes": [0]}, "here")


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_BOMB, "more than 10,000 values"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("data: &a {x: *a}", "nested too deeply"),
        ("seed: !!python/object/apply:pathlib.Path.touch [evil]", "tags"),
        ("seed: !!int 3", "tags"),
        ("#" * 2**21, "larger than"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("seed: 2026-99-99", "valid integer"),
        ('data: {source: "a\\0b"}', "no file, folder or dataset"),
        (f"data: {{source: {'a' * 300}}}", "no file, folder or dataset"),
    ],
)
def test_hostile_yaml_gets_a_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("given", "shape", "classes", "expected"),
    [
        ({}, (3, 32, 32), ("cat", "dog"), (4, True)),
        ({}, (3, 224, 224), (), (4, True)),
        ({}, (3, 16, 64), ("cat", "dog"), (2, True)),
        ({}, (1, 32, 32), ("cat", "dog"), (4, False)),
        ({}, (1, 8, 8), tuple("0123456789"), (1, False)),
        ({}, (3, 32, 32), tuple("0123456789"), (4, False)),
        ({}, (3, 32, 32), ("0", "1", "10"), (4, True)),
        ({"flip": True}, (1, 8, 8), tuple("01"), (1, True)),
        ({"flip": False, "padding": 0}, (3, 32, 32), (), (0, False)),
        ({"padding": 7}, (3, 32, 32), (), (7, True)),
    ],
)
def test_augmentation_depends_on_the_images_unless_it_is_given(
    given: dict[str, int], shape: tuple[int, ...], classes: tuple[str, ...], expected: tuple[int, bool]
) -> None:
    found = Augmentation.model_validate(given).filled(shape, classes)
    assert (found.padding, found.flip) == expected
    assert found.filled((1, 8, 8), ()) == found


def test_a_change_of_the_flip_keeps_the_padding() -> None:
    recipe = Recipe(augmentation=Augmentation(padding=2, flip=True))
    for change in ({"flip": False}, Augmentation(padding=2, flip=False)):
        assert recipe.with_(augmentation=change).augmentation == Augmentation(padding=2, flip=False)


def test_recipes_for_cifar_state_their_augmentation() -> None:
    for name in settings.names("recipes"):
        if name.startswith("cifar"):
            assert read_recipe(name).augmentation == Augmentation(padding=4, flip=True)


def test_a_recipe_is_filled_as_its_run_and_as_no_other() -> None:
    """What a recipe leaves open is the network's and the data's; what it says is its own."""
    asked = Recipe(alpha=0.3, augmentation=Augmentation(flip=False))
    run = asked.filled("adamw").with_(augmentation={"padding": 2, "flip": False}, alpha=0.0)
    assert asked.filled_as(run, labeled=False) == run
    assert asked.filled_as(run, labeled=True) != run
    for other in (Recipe(optimiser="sgd"), Recipe(main=Phase(epochs=9, learning_rate=1e-3)), Recipe(weight_decay=0.0)):
        assert other.filled_as(run, labeled=False) != run
    assert Recipe(augmentation=Augmentation(flip=True)).filled_as(run, labeled=False) != run
