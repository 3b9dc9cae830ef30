"""Each recipe trains: two steps of every phase, as published too, on generated data of its shape."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from litdeploy.batch import forward
from litdeploy.config import settings
from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.config.spec import AnyInput, CharacterInput, InputSpec, TokenInput, TranslationInput
from litdeploy.errors import SettingsError
from litdeploy.networks import Network, new
from litdeploy.networks.families.stargan import discriminator
from litdeploy.trainer import compress, train
from litdeploy.trainer.methods import METHODS
from litdeploy.trainer.plan import chain_of, plan_run

# Not on the machines that run only what is marked `gpu`.
datasets = pytest.importorskip("datasets")

CPU = torch.device("cpu")
BATCH = 4
# Each phase has one epoch.
ROWS = {"train": 2 * BATCH, "validation": 2, "test": 2}


class Shape(NamedTuple):
    """Of one image or text, how many classes there are, and how its tables call its columns."""

    each: tuple[int, ...]
    classes: int
    columns: tuple[str, str]


# The source that a recipe names → what is generated in its place.
SHAPES = {
    None: Shape((3, 32, 32), 4, ("image", "label")),
    "flwrlabs/celeba": Shape((3, 218, 178), 5, ("image", "celeb_id")),
    "uoft-cs/cifar10": Shape((3, 32, 32), 10, ("img", "label")),
    "uoft-cs/cifar100": Shape((3, 32, 32), 100, ("img", "fine_label")),
    "digits": Shape((1, 8, 8), 10, ("image", "label")),
    "stanfordnlp/imdb": Shape((128,), 2, ("text", "label")),
    "amazon_review_full": Shape((1014,), 5, ("content", "label")),
}


def images(shape: Shape, rows: int) -> tuple[list[Any], Any]:
    channels, *size = shape.each
    pixels = np.random.default_rng(0).integers(0, 256, (rows, *size, channels), np.uint8)
    return [each.squeeze() for each in pixels], datasets.Image()


def texts(shape: Shape, rows: int) -> tuple[list[Any], Any]:
    words = ["good", "bad", "I liked it", "never again", "!"]
    return [" ".join(words[(row * place) % 5] for place in range(300)) for row in range(rows)], datasets.Value("string")


# What the teacher takes → rows of it, with their type in a table.
GENERATED: dict[type[AnyInput], Callable[[Shape, int], tuple[list[Any], Any]]] = {
    InputSpec: images,
    TranslationInput: images,
    CharacterInput: texts,
    TokenInput: texts,
}


def table(shape: Shape, takes: AnyInput, folder: Path, attributes: Sequence[str]) -> Path:
    """A folder with a Parquet file of each split; with a column of each attribute in addition to the label."""
    folder.mkdir()
    content, label = shape.columns
    classes = datasets.ClassLabel(names=[str(number) for number in range(shape.classes)])
    for split, rows in ROWS.items():
        values, kind = GENERATED[type(takes)](shape, rows)
        labels = [(7 * row) % shape.classes for row in range(rows)]
        columns = {content: values, label: labels}
        columns |= {name: [(row >> place) % 2 == 1 for row in range(rows)] for place, name in enumerate(attributes)}
        features = datasets.Features(
            {content: kind, label: classes, **dict.fromkeys(attributes, datasets.Value("bool"))}
        )
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}.parquet")
    return folder


# Family → arguments that make its networks quick; what a recipe says is not of the width.
NARROW = {"resnext": ",cardinality=1,width=4,out_width=4", "vdcnn": ",width=8,hidden=32", "stargan": ",width=4"}


def new_teacher(network: str, recipe: Recipe, shape: Shape) -> Network:
    """With batch norms that have seen a batch: in a hundred layers that have not, numbers overflow."""
    normalise = recipe.normalise or ("half" if len(shape.each) == 3 else None)
    channels, *size = shape.each
    each = (channels, *(recipe.data.image_size or size))
    made = new(network, normalise=normalise, data_shape=each, classes=shape.classes, seed=0)
    for module in made.module.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        forward(made.module.train(), made.example(2 * BATCH))
    made.module.eval()
    return made


def with_discriminator(recipe: Recipe, teacher: Network, folder: Path) -> Recipe:
    """The recipe of a generator with a file that it can be fine-tuned against."""
    takes = teacher.spec.input
    if not isinstance(takes, TranslationInput):
        return recipe
    torch.save(discriminator(3, takes.domains, 4, takes.shape[-1]).state_dict(), folder / "D.ckpt")
    return recipe.with_(discriminator=str(folder / "D.ckpt"))


class Title(NamedTuple):
    """What a recipe's first line says: `ResNet-110 → ResNet-32`, `VDCNN-29 → 17 → 9`, `A ResNet-56 on …`; or, of
    networks that have no number, `StarGAN, …`."""

    family: str
    depth: str
    students: tuple[int, ...]


def named(title: Title, fixtures: pytest.FixtureRequest, folder: Path) -> str:
    """The network as --network takes it; of transformers a narrow one, with as many blocks as the title says."""
    if title.family != "bert":
        return f"{title.family}{title.depth}{NARROW.get(title.family, '')}"
    own = folder / "bert"
    shutil.copytree(fixtures.getfixturevalue("bert_folder"), own)
    config = json.loads((own / "config.json").read_text())
    deep = {"num_hidden_layers": int(title.depth), "max_position_embeddings": 64}
    (own / "config.json").write_text(json.dumps({**config, **deep}))
    return f"hf:{own}"


def title_of(name: str) -> Title:
    first = (settings.folder("recipes") / f"{name}.yaml").read_text().splitlines()[0]
    found = re.match(r"# (?:A )?([A-Z]\w+)(?:-(\d+))?((?: → (?:\w+-)?\d+)*)", first)
    assert found, f"recipes/{name}.yaml: the first line names teacher and students, as in # ResNet-56 → ResNet-20"
    students = re.findall(r"→ (?:(\w+)-)?(\d+)", found[3])
    assert {family for family, _ in students} <= {"", found[1]}
    of_file = re.search(r"-([a-z]+)(\d+)-(\d+)$", name)
    assert of_file is None or of_file.groups() == (found[1].lower(), found[2], students[-1][1])
    return Title(found[1].lower(), found[2] or "", tuple(int(depth) for _, depth in students))


def check_student(recipe: Recipe, title: Title) -> None:
    """The recipe makes what its first line says."""
    match METHODS[recipe.method].student:
        case "shallower":
            assert recipe.depths == title.students
        case "whole":
            assert recipe.depths == ()
            assert {str(depth) for depth in title.students} <= {title.depth}
        case "own":
            assert recipe.indistill is not None
            assert f"{recipe.indistill.student},".startswith(f"{title.family}{title.students[0]},")


def shortest(recipe: Recipe, teacher: Network) -> tuple[Recipe, list[list[str]]]:
    """The recipe with one epoch for each of its phases, and their names, student by student."""

    def phases(of: Recipe) -> list[list[str]]:
        students = chain_of(teacher, of)
        planned = plan_run(teacher, students[0], None, CPU).phases  # the same for each student of a chain
        return [[each.name for each in planned if each.settings.epochs] for _ in students]

    expected = phases(recipe)
    for epochs in range(1, 9):
        short = {"epochs": epochs, "milestones": ()}, {"epochs": min(1, recipe.finetune.epochs), "milestones": ()}
        main, finetune = (
            phase.model_copy(update=change) for phase, change in zip((recipe.main, recipe.finetune), short, strict=True)
        )
        shorter = recipe.model_copy(update={"main": main, "finetune": finetune})
        try:
            if phases(shorter) == expected:
                return shorter, expected
        except SettingsError:  # fewer epochs than phases
            continue
    raise AssertionError(f"no few epochs have the phases {expected}")


def trained_phases(metrics: Path) -> list[str]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    return [row["phase"] for row in rows if row["phase"] != "cut"]


VARIANTS = [
    name + variant
    for name in settings.names("recipes")
    for variant in ("", ":paper")
    if not variant or "\npaper:" in (settings.folder("recipes") / f"{name}.yaml").read_text()
]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_trains_two_steps_of_each_phase(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe, title = read_recipe(name), title_of(name.partition(":")[0])
    check_student(recipe, title)
    shape = SHAPES[recipe.data.source]
    recipe = recipe.with_(batch_size=BATCH, compile="off", feature_cache="off", precision="fp32")
    network = named(title, request, tmp_path)
    teacher = new_teacher(network, recipe, shape)
    recipe = with_discriminator(recipe, teacher, tmp_path)
    data = {"source": str(table(shape, teacher.spec.input, tmp_path / "data", recipe.data.attributes or ()))}
    if title.students or recipe.method != "scratch":
        recipe, phases = shortest(recipe, teacher)
        bundle = compress(teacher, recipe=recipe, data=data, out=tmp_path / "deploy", device="cpu")
        students = [*map(bundle.in_chain, recipe.depths[:-1]), bundle]
        assert [trained_phases(each.metrics_path) for each in students] == phases
        assert [each.read_complete().data.images for each in students] == [ROWS] * len(students)
    else:
        train(network, recipe=recipe, data=data, out=tmp_path / "new.safetensors", device="cpu", epochs=1)
        assert trained_phases(tmp_path / "new.metrics.jsonl") == ["scratch"]
