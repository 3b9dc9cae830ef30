"""The watch over a run's losses."""

from __future__ import annotations

import pytest
import torch

from litdeploy.config.recipe import Phase
from litdeploy.errors import TrainingError
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.monitor import INTERVAL, LossMonitor
from litdeploy.trainer.objectives import CrossEntropy
from litdeploy.trainer.resume import Position


def monitor(position: Position) -> LossMonitor:
    phase = TrainingPhase("kd", Phase(epochs=1, learning_rate=0.3), CrossEntropy())
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    return LossMonitor(position, phase, optimizer)


def feed(found: LossMonitor, position: Position, *rows: dict[str, float]) -> None:
    for row in rows:
        found.add({name: torch.tensor(loss) for name, loss in row.items()})
        position.count_step(4)


def test_losses_are_summed_up_and_flags_told() -> None:
    position = Position()
    found = monitor(position)
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
    found = monitor(position)
    fine = {"loss": 1.0, "section/layer2": 0.5}
    feed(found, position, *[fine] * 7, {"loss": loss, "section/layer2": loss}, fine)
    with pytest.raises(TrainingError, match=r"epoch 4, step 8 \(kd\): loss \(\w+\), section/layer2 .* about 0\.1\."):
        found.look()
    assert position.sums == {}  # nothing of it is taken over


def test_a_loss_that_diverges_is_told_from_one_that_is_large() -> None:
    def after(first: float, then: float) -> None:
        position = Position()
        found = monitor(position)
        for loss in (first, then):
            feed(found, position, *({"loss": loss, "kd": 1.0, "section/layer1": loss} for _ in range(INTERVAL)))
            found.look()

    after(0.001, 900.0)
    after(50.0, 49_000.0)
    for first, then in ((0.001, 1100.0), (50.0, 51_000.0)):
        with pytest.raises(TrainingError, match=r"step 40 .*diverges.*its largest part is section/layer1"):
            after(first, then)
