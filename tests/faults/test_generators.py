"""A generator's run that is stopped in each of its phases: by LIT, then against a discriminator."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.errors import BundleError, InterruptedRun
from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import Progress, compress
from tests.faults.conftest import Watching, assert_same, result

BATCH = 8
STEPS = 4  # an epoch: 33 of the 36 images are trained on

Train = Callable[..., Bundle]


@pytest.fixture(scope="module")
def generator(generator_files: Path) -> Train:
    """Compresses to the folder that it is given, in four epochs of four steps."""

    def call(out: Path, **changes: Any) -> Bundle:
        given: dict[str, Any] = {
            "data": generator_files / "domains",
            "discriminator": str(generator_files / "D.ckpt"),
            "input_shape": (3, 16, 16),
            "student_blocks": {"blocks": 2},
            "main": {"epochs": 2, "learning_rate": 0.01},
            "finetune": {"epochs": 2, "learning_rate": 1e-4},
            "optimiser": "adamw",
            "betas": [0.5, 0.999],
            "beta": 0,
            "batch_size": BATCH,
            "precision": "fp32",
            "device": "cpu",
            "checkpoint_every": "off",
        }
        return compress(generator_files / "G.ckpt", out=out, **{**given, **changes})

    return call


@pytest.fixture(scope="module")
def whole(generator: Train, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A run that nobody stopped."""
    return generator(tmp_path_factory.mktemp("whole") / "deploy")


class _Stopping(Watching):
    """Sends the signal once so many steps of the process are done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self.images += samples
        if self.images == self._steps * BATCH:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("steps", [2, 2 * STEPS, 2 * STEPS + 1, 4 * STEPS])
def test_a_stopped_run_ends_bit_equal(steps: int, generator: Train, whole: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="--resume"):
        generator(tmp_path / "deploy", progress=_Stopping(steps))
    stopped = Bundle(tmp_path / "deploy")
    assert stopped.read().status == "interrupted"
    assert not stopped.samples_path.exists()
    again = Watching()
    found = generator(tmp_path / "deploy", resume=True, progress=again)
    # Of an epoch under way the steps before are shown as done; one whose last step is done is only evaluated.
    assert again.images == BATCH * (4 * STEPS - steps + steps % STEPS + (STEPS if steps % STEPS == 0 else 0))
    assert_same(found, whole)
    assert found.samples_path.read_bytes() == whole.samples_path.read_bytes()


class _Killed(Exception):
    """Nothing that a run expects."""


class _Killing(Progress):
    """Ends the process's run as an epoch begins, or as the sheet is to be drawn."""

    def __init__(self, epoch: int = 0, note: str = "") -> None:
        self._epoch, self._note = epoch, note

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        if epoch == self._epoch:
            raise _Killed

    def note(self, text: str) -> None:
        if self._note and text.startswith(self._note):
            raise _Killed


@pytest.mark.parametrize("killing", [_Killing(3), _Killing(note="testing teacher")])
def test_a_run_that_was_killed_ends_bit_equal(
    killing: _Killing, generator: Train, whole: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(_Killed):
        generator(tmp_path / "deploy", progress=killing, checkpoint_every="1epoch")
    assert_same(generator(tmp_path / "deploy", resume=True, checkpoint_every="1epoch"), whole)


def test_by_equation_6_alone_too(generator: Train, tmp_path: Path) -> None:
    alone = {"teacher_weight": 0, "optimiser": "sgd"}
    expected = generator(tmp_path / "whole", **alone)
    with pytest.raises(InterruptedRun):
        generator(tmp_path / "deploy", progress=_Stopping(2 * STEPS + 2), **alone)
    assert_same(generator(tmp_path / "deploy", resume=True, **alone), expected)
    rows = result(expected)[1]
    assert "teacher" not in rows[-1]


def test_another_discriminator_is_another_run_and_one_that_was_moved_is_not(
    generator: Train, generator_files: Path, whole: Bundle, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved.ckpt", tmp_path / "other.ckpt"
    moved.write_bytes((generator_files / "D.ckpt").read_bytes())
    weights = torch.load(moved, weights_only=True)
    torch.save({name: -weight for name, weight in weights.items()}, other)
    with pytest.raises(InterruptedRun):
        generator(tmp_path / "deploy", progress=_Stopping(2))
    with pytest.raises(BundleError, match="discriminator: "):
        generator(tmp_path / "deploy", resume=True, discriminator=str(other))
    found = generator(tmp_path / "deploy", resume=True, discriminator=str(moved))
    assert_same(found, whole)
    assert found.read().discriminator_sha256 == whole.read().discriminator_sha256
    with pytest.raises(BundleError, match="discriminator: "):  # complete
        generator(tmp_path / "deploy", resume=True, discriminator=str(other))
