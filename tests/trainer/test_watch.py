from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from litdeploy.config.recipe import Phase
from litdeploy.errors import TrainingError
from litdeploy.trainer.objectives import CrossEntropy, TrainingPhase
from litdeploy.trainer.parallel import ALONE
from litdeploy.trainer.run import Position, Run, Share
from litdeploy.trainer.watch import INTERVAL, Watch


def watch(position: Position) -> Watch:
    share = Share(TrainingPhase("kd", Phase(epochs=1, learning_rate=0.3), CrossEntropy()), (), ALONE)
    optimiser = torch.optim.SGD([torch.zeros(1)], 0.1)
    return Watch(cast("Run", SimpleNamespace(position=position, ranks=ALONE)), share, optimiser)


def feed(found: Watch, position: Position, *rows: dict[str, float]) -> None:
    for row in rows:
        found.add({name: torch.tensor(loss) for name, loss in row.items()})
        position.count_step(4)


def test_losses_are_summed_up_and_flags_told() -> None:
    position = Position()
    found = watch(position)
    feed(found, position, *({"loss": 2.0, "kd": 1.0} for _ in range(INTERVAL - 1)))
    assert not found.full
    feed(found, position, {"loss": 1.0, "kd": 0.5})
    assert found.full
    assert found.look(True, False) == [True, False]
    assert not found.full
    feed(found, position, {"loss": 0.25, "kd": 0.0})
    assert found.look() == []
    assert position.sums == {"loss": 2.0 * 19 + 1.25, "kd": 19.5}
    assert position.first_loss == pytest.approx(39 / 20)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_step_and_the_part_that_went_astray_are_named(loss: float) -> None:
    position = Position(epochs_done=3)
    found = watch(position)
    fine = {"loss": 1.0, "section/layer2": 0.5}
    feed(found, position, *[fine] * 7, {"loss": loss, "section/layer2": loss}, fine)
    with pytest.raises(TrainingError, match=r"epoch 4, step 8 \(kd\): loss \(\w+\), section/layer2 .* about 0\.1\."):
        found.look()
    assert position.sums == {}  # nothing of it is taken over


def test_a_loss_that_diverges_is_told_from_one_that_is_large() -> None:
    def after(first: float, then: float) -> None:
        position = Position()
        found = watch(position)
        for loss in (first, then):
            feed(found, position, *({"loss": loss, "kd": 1.0, "section/layer1": loss} for _ in range(INTERVAL)))
            found.look()

    after(0.001, 900.0)
    after(50.0, 49_000.0)
    for first, then in ((0.001, 1100.0), (50.0, 51_000.0)):
        with pytest.raises(TrainingError, match=r"step 40 .*diverges.*its largest part is section/layer1"):
            after(first, then)


def test_a_new_phase_has_its_own_beginning() -> None:
    position: Any = Position(first_loss=3.0, epoch=2, step=0)
    position.enter(1)
    assert (position.phase, position.epoch, position.first_loss) == (1, 0, None)
