from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from litdeploy.comparison import commands, compare
from litdeploy.config.recipe import SlimmingSettings, read_recipe
from litdeploy.errors import BundleError, SettingsError, StudentError
from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import Progress, compress

QUICK: dict[str, Any] = {
    "recipe": "digits-resnet",
    "methods": ("scratch", "lit"),
    "depths": (8,),
    "seeds": 2,
    "epochs": 1,
    "device": "cpu",
}


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path) -> Path:
    out = tmp_path_factory.mktemp("compared") / "comparison"
    compare(teacher_path, out=out, **QUICK)
    return out


def test_the_table_holds_every_training(folder: Path) -> None:
    found = json.loads((folder / "comparison.json").read_text())
    assert [(each["seed"], each["method"]) for each in found["outcomes"]] == [
        (0, "lit"),
        (0, "scratch"),
        (1, "lit"),
        (1, "scratch"),
    ]
    for each in found["outcomes"]:
        manifest = Bundle(folder / "cells" / f"{each['method']}-8-{each['seed']}").read_complete()
        assert each["test"] == manifest.metrics["student"]["test"].model_dump()
        assert manifest.recipe.epochs == 1
    for row in found["rows"]:
        members = [each["test"]["top1"] for each in found["outcomes"] if each["method"] == row["method"]]
        assert row["mean"] == pytest.approx(sum(members) / 2)
        assert row["low"] <= row["mean"] <= row["high"]
    assert found["missing"] == []
    lines = (folder / "comparison.csv").read_text().splitlines()
    assert len(lines) == 5
    assert "<svg" in (folder / "comparison.svg").read_text()
    assert "lit" in (folder / "comparison.html").read_text()


def test_the_teachers_features_do_not_outlive_their_seed(folder: Path) -> None:
    assert not list((folder / "features").iterdir())


def test_what_is_there_is_not_trained_again(folder: Path, teacher_path: Path) -> None:
    notes = Notes()
    before = (folder / "cells" / "lit-8-0" / "manifest.json").stat().st_mtime_ns
    result = compare(teacher_path, out=folder, progress=notes, **QUICK)
    assert not notes.notes
    assert (folder / "cells" / "lit-8-0" / "manifest.json").stat().st_mtime_ns == before
    assert len(result.outcomes) == 4


def test_what_a_killed_call_left_is_removed(folder: Path, teacher_path: Path) -> None:
    checkpoint = folder / "cells/lit-8-0/checkpoints/epoch-0001-step-00000.safetensors"
    features, mine = folder / "features/0/layer1.bin", folder / "features/1/notes.txt"
    for path in (checkpoint, features, mine):
        path.parent.mkdir(parents=True)
        path.touch()
    (folder / ".comparison.json.99999.partial").touch()
    compare(teacher_path, out=folder, **QUICK)
    assert not checkpoint.parent.exists()
    assert not features.parent.exists()
    assert mine.exists()
    assert not list(folder.glob(".*.partial"))
    mine.unlink()


def test_a_call_that_was_killed_as_it_began_is_repeated(tmp_path: Path, teacher_path: Path) -> None:
    (tmp_path / ".recipe.yaml.99999.partial").touch()
    assert commands(teacher_path, out=tmp_path, **{**QUICK, "device": "cpu"})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipes_chain_is_left_out_and_told(tmp_path: Path, teacher_path: Path) -> None:
    recipe = read_recipe("digits-resnet").with_(student_depth=(11, 8))
    notes = Notes()
    asked = {**QUICK, "recipe": recipe, "methods": ("lit",), "seeds": 1}
    result = compare(teacher_path, out=tmp_path / "comparison", train=False, progress=notes, **asked)
    assert notes.notes == ["the recipe's chain 11,8 is ignored: here each student learns from the teacher itself"]
    (line,) = result.missing
    assert " --student-depth 8 " in line
    listing = Notes()
    listed = {name: value for name, value in asked.items() if name != "device"}
    assert len(commands(teacher_path, out=tmp_path / "comparison", progress=listing, **listed)) == 1
    assert listing.notes == notes.notes
    assert read_recipe(tmp_path / "comparison" / "recipe.yaml").student_depth is None


def test_a_training_from_elsewhere_is_gathered(tmp_path: Path, teacher_path: Path) -> None:
    """Its own `litdeploy compress`, as --list prints it, makes a cell that the next call takes."""
    out = tmp_path / "comparison"
    asked = {**QUICK, "methods": ("kd",), "seeds": 1}
    (line,) = commands(teacher_path, out=out, **asked)
    options = shlex.split(line)
    assert options[-1] == "--resume"
    given = dict(zip(options[3:-1:2], options[4::2], strict=True))
    assert options[:3] == ["litdeploy", "compress", str(teacher_path)]
    compress(
        teacher_path,
        recipe=given["--recipe"],
        method=given["--method"],
        student_depth=int(given["--student-depth"]),
        seed=int(given["--seed"]),
        out=given["--out"],
        device=given["--device"],
    )
    result = compare(teacher_path, out=out, train=False, **{**asked, "methods": ("kd", "lit")})
    assert [each.method for each in result.outcomes] == ["kd"]
    assert result.rows[0].low is None
    assert len(result.missing) == 1
    assert "--method lit" in result.missing[0]
    assert commands(teacher_path, out=out, **asked) == []


def test_an_earlier_depth_stays_in_the_table(folder: Path, teacher_path: Path) -> None:
    result = compare(teacher_path, out=folder, train=False, **{**QUICK, "depths": (14,), "methods": ("lit",)})
    assert result.depths == [8]
    assert len(result.missing) == 2


def test_a_folder_of_another_recipe_is_refused_and_kept(folder: Path, teacher_path: Path) -> None:
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(BundleError, match="another recipe \\(main differ"):
        compare(teacher_path, out=folder, **{**QUICK, "epochs": 2})
    assert (folder / "recipe.yaml").read_bytes() == before


def test_a_cell_that_holds_something_else_is_refused(folder: Path, teacher_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    asked = {**QUICK, "methods": ("lit",), "seeds": 1}
    commands(teacher_path, out=out, **asked)
    (out / "cells").mkdir()
    (out / "cells" / "lit-8-0").symlink_to(folder / "cells" / "scratch-8-0")
    with pytest.raises(BundleError, match="another recipe"):
        compare(teacher_path, out=out, **asked)


def test_a_generator_is_refused_before_anything_is_trained(generator_files: Path, tmp_path: Path) -> None:
    asked = {**QUICK, "out": tmp_path / "new", "recipe": "coloured-digits-stargan", "data": generator_files / "domains"}
    for verb in (compare, commands):
        given = asked if verb is compare else {k: v for k, v in asked.items() if k != "device"}
        with pytest.raises(SettingsError, match=r"makes images, and compare ranks methods by accuracy"):
            verb(generator_files / "G.ckpt", **given, input_shape=(3, 16, 16))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, teacher_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="--out"):
        compare(teacher_path, out=tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"methods": ("lit", "magic")}, SettingsError, "method"),
        ({"depths": (8, 9)}, StudentError, "9"),
        ({"depths": ()}, SettingsError, "nothing to compare"),
        ({"seeds": 0}, SettingsError, "--seeds"),
        ({"methods": ("kd", "born-again")}, StudentError, "born-again keeps the teacher's depth, 14"),
        ({"methods": ("slimming",), "depths": (14,)}, SettingsError, "--epochs 2"),
        ({"methods": ("indistill",)}, SettingsError, "compress .* --method indistill"),
    ],
)
def test_what_cannot_be_compared_is_told_before_any_training(
    changes: dict[str, Any], error: type[Exception], told: str, tmp_path: Path, teacher_path: Path
) -> None:
    with pytest.raises(error, match=told):
        compare(teacher_path, out=tmp_path / "comparison", **{**QUICK, **changes})
    assert not (tmp_path / "comparison").exists()


def test_methods_of_the_teachers_depth_are_compared_at_it(tmp_path: Path, teacher_path: Path) -> None:
    """The recipe's settings of a method are for that one's cells, here and in the commands of --list."""
    recipe = read_recipe("digits-resnet").with_(method="slimming", slimming={"prune_ratio": 0.6}, seed=3)
    methods = ("born-again", "kd", "slimming")
    asked = {**QUICK, "recipe": recipe, "methods": methods, "depths": (14,), "seeds": 1, "epochs": 3}
    result = compare(teacher_path, out=tmp_path / "comparison", **asked)
    assert {each.method for each in result.outcomes} == set(methods)
    recipes = {name: Bundle(tmp_path / "comparison" / "cells" / f"{name}-14-0").read().recipe for name in methods}
    assert [each.slimming for each in recipes.values()] == [None, None, SlimmingSettings(prune_ratio=0.6)]
    assert read_recipe(tmp_path / "comparison" / "recipe.yaml").with_(method="kd").slimming is None
    assert commands(teacher_path, out=tmp_path / "comparison", **asked) == []


def test_a_training_that_diverges_does_not_stop_the_others(tmp_path: Path, teacher_path: Path) -> None:
    asked = {**QUICK, "methods": ("kd",), "seeds": 1, "learning_rate": 1e30}
    result = compare(teacher_path, out=tmp_path / "comparison", **asked)
    assert "kd-8-0" in result.failed
    assert "not a finite number" in (tmp_path / "comparison" / "comparison.html").read_text()
