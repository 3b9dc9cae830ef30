from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.data import open_data
from litdeploy.networks import new
from litdeploy.trainer.distributed import ALONE
from litdeploy.trainer.plan import Plan
from litdeploy.trainer.progress import Callback
from litdeploy.trainer.resume import Checkpoints, Every
from litdeploy.trainer.teacher import Teacher
from litdeploy.trainer.trainer import Trainer
from tests import sections

CPU = torch.device("cpu")
SECTIONS = ("layer1", "layer2", "layer3")
MakeRun = Callable[..., Trainer]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Makes a run on digits that has not begun: teacher and student are networks of one shape and other weights."""

    def make(recipe: Recipe, network: str = "resnet14,width=4") -> Trainer:
        teacher, student = (
            new(network, normalise="half", input_shape=(1, 8, 8), classes=10, seed=seed) for seed in (1, 2)
        )
        own = tuple(sections.of(student.module, SECTIONS))
        trainer = Trainer(
            Plan(recipe.filled("sgd"), student, [], own, own),
            open_data(DataSettings(source="digits"), CPU, 0),
            "fp32",
            CPU,
            tmp_path,
            tmp_path / "metrics.jsonl",
            Callback(),
            ALONE,
            Checkpoints(tmp_path / "checkpoints", {}, Every(), print),
        )
        trainer.teacher = Teacher(teacher.module, own, teacher.example(), CPU)
        return held.enter_context(trainer)

    with ExitStack() as held:
        yield make
