"""The training loop: what an epoch trains on, and its losses."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.recipe import Augmentation, Phase, Recipe, read_recipe
from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.data import Data, augment, draw_crops, normalise, shuffled
from litdeploy.data.split import Resident
from litdeploy.errors import SettingsError
from litdeploy.networks import Network
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.student import make_student
from litdeploy.trainer.distributed import ALONE, Ranks
from litdeploy.trainer.feature_cache import FeatureCache, Layout
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.objectives import CrossEntropy, Lit, Objective
from litdeploy.trainer.optimizer import new_optimizer
from litdeploy.trainer.plan import Plan
from litdeploy.trainer.progress import Callback
from litdeploy.trainer.resume import Checkpoints, Every, Position
from litdeploy.trainer.step import Step, inputs_needed, outputs_needed
from litdeploy.trainer.teacher import Features, Teacher
from litdeploy.trainer.trainer import Trainer
from tests import sections

NAMES = ("layer1", "layer2", "layer3")
PLAN = dict.fromkeys(NAMES, (0,))
SPEC = InputSpec(shape=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
RECIPE = Recipe(batch_size=4, augmentation=Augmentation(padding=1, flip=True), compile="off", seed=3).filled("sgd")
STILL = RECIPE.model_copy(update={"augmentation": Augmentation(padding=0, flip=False)})
CPU = torch.device("cpu")


def images() -> Tensor:
    return torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def held(device: torch.device) -> Resident:
    """A split of ten images."""
    return Resident(images().to(device), (torch.arange(10) % 10).to(device))


class Counting(Teacher):
    """A teacher that counts its passes."""

    passes = 0

    def __call__(self, images_NCHW: Tensor) -> Features:
        self.passes += 1
        return super().__call__(images_NCHW)


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet(14, width=4).eval()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def trainer_of(student: nn.Module, split: Resident, device: torch.device, precision: str, recipe: Recipe) -> Trainer:
    spec = NetworkSpec(name="resnet", arguments={"depth": 14, "width": 4}, input=SPEC)
    data = cast(Data, SimpleNamespace(train=split, noun="image", classes=(), given=False))
    place = Path(os.devnull)
    own = tuple(sections.of_student(student, network(), PLAN))
    return Trainer(
        Plan(recipe, Network(student, spec, "student"), [], own, own),
        data,
        precision,
        device,
        place,
        place,
        Callback(),
        ALONE,
        Checkpoints(place, {}, Every(), print),
    )


def run(
    objective: Objective,
    views: int,
    epochs: int,
    device: torch.device,
    capture: bool = False,
    precision: str = "fp32",
    recipe: Recipe = RECIPE,
) -> tuple[list[float], nn.Module, Counting]:
    """The losses of each step, the student, the teacher."""
    module = network()
    teacher = Counting(module, sections.of(module, NAMES), torch.zeros(1, 3, 8, 8), device, precision)
    split = held(device)
    losses = []
    with trainer_of(make_student(module, PLAN), split, device, precision, recipe) as trainer:
        trainer.teacher = teacher
        if views:
            layout = Layout.of(teacher.template, inputs_needed(objective, trainer.sections), outputs_needed(objective))
            assert layout is not None
            trainer.cache = FeatureCache(
                teacher.template, layout, views, len(split), recipe.augmentation.padding, device
            )
        phase = Phase(epochs=epochs, learning_rate=0.05, schedule="step")
        with trainer.begun(TrainingPhase("lit", phase, objective)):
            if not capture:
                trainer._update_new, trainer._update_cached = (
                    lambda *batch: trainer._update(False, *batch),
                    lambda *batch: trainer._update(True, *batch),
                )
            add = trainer.monitor.add

            def keep(found: dict[str, Tensor]) -> None:
                losses.append(found["loss"].item())
                add(found)

            trainer.monitor.add = keep  # type: ignore[method-assign]
            for _ in range(epochs):
                trainer.train_epoch()
                trainer.position.end_epoch({})
        return losses, trainer.student, teacher


def test_an_epoch_is_these_steps() -> None:
    found, student, _ = run(Lit(RECIPE, NAMES), 0, 2, CPU)

    module, split, order, draws = network(), held(CPU), seeded(), seeded()
    teacher = Teacher(module, sections.of(module, NAMES), torch.zeros(1, 3, 8, 8), CPU)
    other = make_student(module, PLAN).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = []
    with Step(other, Lit(RECIPE, NAMES), sections.of_student(other, module, PLAN)) as step:
        optimizer = new_optimizer(other, RECIPE, Phase(epochs=2, learning_rate=0.05), CPU)
        for _ in range(2):
            for indices_N in shuffled(10, 4, order):
                crops = draw_crops(4, RECIPE.augmentation, draws)
                images_NCHW = normalise(augment(images()[indices_N], crops), SPEC)
                losses = step(optimizer, images_NCHW, split.labels[indices_N], teacher(images_NCHW))
                expected.append(losses["loss"].item())
    assert len(found) == 2 * 2  # of ten images two are left over
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def seen_by(ranks: Ranks, sampling: bool = False) -> list[Tensor]:
    """The images of each step of two epochs."""
    seen = []

    def step(optimizer: Any, inputs: Tensor, labels_N: Tensor, features: Features | None) -> dict[str, Tensor]:
        seen.append(inputs)
        optimizer.step()
        return {"loss": torch.zeros(())}

    with (
        trainer_of(network(), held(CPU), CPU, "fp32", RECIPE) as trainer,
        trainer.begun(TrainingPhase("scratch", Phase(epochs=2, learning_rate=0.1), CrossEntropy())),
    ):
        trainer.sharing, trainer.step = ranks, cast(Step, step)
        for _ in range(2):
            trainer.train_epoch()
            trainer.position.end_epoch({})
            if sampling:
                seen.append(torch.cat(list(trainer._samples(1))))
    return seen


def test_two_ranks_see_the_parts_of_what_one_sees() -> None:
    for whole, *parts in zip(seen_by(ALONE), seen_by(Ranks(0, 2)), seen_by(Ranks(1, 2)), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_samples_are_the_same_each_time_and_change_no_step() -> None:
    first, second, sample, third, fourth, again = seen_by(ALONE, sampling=True)
    assert torch.equal(sample, again)
    assert len(sample) == RECIPE.batch_size
    for mine, other in zip((first, second, third, fourth), seen_by(ALONE), strict=True):
        assert torch.equal(mine, other)


def test_without_a_teacher() -> None:
    losses, _, teacher = run(CrossEntropy(), 0, 8, CPU)
    assert teacher.passes == 0
    assert sum(losses[-4:]) < sum(losses[:4])


def test_with_kept_features_the_teacher_rests() -> None:
    fresh, _, always = run(Lit(RECIPE, NAMES), 0, 5, CPU)
    kept, _, sometimes = run(Lit(RECIPE, NAMES), 2, 5, CPU)
    assert always.passes == 2 * 5
    # The two passes that fill it, and a third batch of images that were left over until then, at the most.
    assert 2 * 2 <= sometimes.passes <= 2 * 5 - 2
    assert kept[:2] == fresh[:2]  # filling it changes nothing
    assert kept != fresh


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-2), ("bf16", 0)])
def test_kept_features_are_the_teachers(precision: str, tolerance: float) -> None:
    # Without augmentation there is but one view: what is kept must train as the teacher itself does. In bf16 it is what
    # the teacher gave, to the bit.
    fresh, _, _ = run(Lit(STILL, NAMES), 0, 4, CPU, precision=precision, recipe=STILL)
    kept, _, teacher = run(Lit(STILL, NAMES), 1, 4, CPU, precision=precision, recipe=STILL)
    assert teacher.passes < 2 * 4
    assert kept == pytest.approx(fresh, rel=tolerance)
    assert fresh[-1] < fresh[0]


@pytest.mark.gpu
@pytest.mark.parametrize("views", [0, 2])
def test_captured_and_eager_give_the_same_losses(views: int) -> None:
    cuda = torch.device("cuda")
    eager, first, _ = run(Lit(RECIPE, NAMES), views, 8, cuda)
    captured, second, _ = run(Lit(RECIPE, NAMES), views, 8, cuda, capture=True)
    assert captured == pytest.approx(eager, rel=1e-4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_new_phase_has_its_own_beginning() -> None:
    position: Any = Position(first_loss=3.0, epoch=2, step=0)
    position.enter(1)
    assert (position.phase, position.epoch, position.first_loss) == (1, 0, None)


@pytest.mark.parametrize("wrong", ["optimiser: adam", "betas: [0.9, 1]", "betas: [0.9]"])
def test_what_is_none_is_refused(wrong: str, tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(SettingsError, match=wrong.partition(":")[0]):
        read_recipe(tmp_path / "mine.yaml")
