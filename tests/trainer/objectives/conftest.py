from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.data import open_data
from litdeploy.networks import new
from litdeploy.trainer.metrics import MetricsLog, Progress
from litdeploy.trainer.run import Run
from litdeploy.trainer.teacher import Teacher

CPU = torch.device("cpu")
SECTIONS = ("layer1", "layer2", "layer3")
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Makes a run on digits that has not begun: teacher and student are networks of one shape and other weights."""

    def make(recipe: Recipe, network: str = "resnet14,width=4") -> Run:
        teacher, student = (
            new(network, normalise="half", input_shape=(1, 8, 8), classes=10, seed=seed) for seed in (1, 2)
        )
        return Run(
            student=student.module,
            teacher=Teacher(teacher.module, SECTIONS, teacher.example(), CPU),
            phases=(),
            sections=SECTIONS,
            data=open_data(DataSettings(source="digits"), CPU, 0),
            spec=student.spec,
            input=student.spec.input,
            recipe=recipe,
            precision="fp32",
            device=CPU,
            folder=tmp_path,
            log=log,
            progress=Progress(),
            example=student.example(),
        )

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        yield make
