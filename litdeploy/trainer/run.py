"""A run: what it works with, and how far it came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from litdeploy.batch import Batch
from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.data import Data
from litdeploy.storage.records import Score
from litdeploy.trainer.cache import FeatureCache
from litdeploy.trainer.checkpoints import Checkpoints, Saved
from litdeploy.trainer.interruption import Interruption
from litdeploy.trainer.metrics import MetricsLog, Progress, Row
from litdeploy.trainer.objectives import TrainingPhase
from litdeploy.trainer.parallel import ALONE, Ranks
from litdeploy.trainer.teacher import Teacher


class Position(BaseModel):
    """How far a run came, and what it counted on the way.

    Attributes:
        phase: index of the one under way, or of the last.
        epoch: whole epochs of the phase.
        step: steps done of the epoch under way.
        sums: of each loss, over these steps.
        seconds: that these steps took.
        first_loss: mean over the phase's first steps; what a diverging one is held against.
        epochs_done, training_seconds: of all phases together, whole epochs.
        steps_done, images_done: of all phases together.
        validation: how good the student was after the last whole epoch.
        rows: the metrics so far.
        started: when the run began (ISO 8601).
        elapsed: seconds of wall-clock time in the processes before this one.
    """

    model_config = ConfigDict(extra="forbid")

    phase: int = Field(0, ge=0)
    epoch: int = Field(0, ge=0)
    step: int = Field(0, ge=0)
    sums: dict[str, float] = {}
    seconds: float = 0.0
    first_loss: float | None = None
    epochs_done: int = Field(0, ge=0)
    steps_done: int = Field(0, ge=0)
    images_done: int = Field(0, ge=0)
    training_seconds: float = 0.0
    validation: Score | None = None
    rows: list[Row] = []
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    elapsed: float = 0.0

    def enter(self, phase: int) -> None:
        """The phase begins."""
        self.phase, self.epoch, self.first_loss = phase, 0, None

    def count_step(self, images: int) -> None:
        """One more step is done."""
        self.step += 1
        self.steps_done += 1
        self.images_done += images

    def end_epoch(self, row: Row) -> None:
        """The epoch is over, with these metrics."""
        self.epoch += 1
        self.epochs_done += 1
        self.training_seconds += self.seconds
        self.rows.append(row)
        self.step, self.sums, self.seconds = 0, {}, 0.0


@dataclass
class Run:
    """What a run works with, and how far it came.

    Attributes:
        student: trained in place, on `device`, channels-last.
        teacher: None where no phase needs one.
        spec: of the student; it rebuilds the student as it is now.
        sections: names of the student's planned sections, in the order they run in.
        folder: where the run keeps what it needs to go on, beside its checkpoints.
        example: what the student takes, of a few images.
        reference: whose images the student's are measured against, on `device`; None where it tells classes apart.
        discriminator: SHA-256 of the file that the student is fine-tuned against; None where there is none.
        cache: of the teacher's features; None: none are kept.
        ranks: that share the run.
        checkpoints: where it leaves what it can be gone on from; None: nowhere.
        saved: what it goes on from; None: it begins.
        order, draws: generators of the order of the images and of their crops, on the CPU.
    """

    student: nn.Module
    teacher: Teacher | None
    phases: Sequence[TrainingPhase]
    sections: Sequence[str]
    data: Data
    spec: NetworkSpec
    input: AnyInput
    recipe: Recipe
    precision: str
    device: torch.device
    folder: Path
    log: MetricsLog
    progress: Progress
    example: Batch
    reference: nn.Module | None = None
    discriminator: str | None = None
    cache: FeatureCache | None = None
    ranks: Ranks = ALONE
    checkpoints: Checkpoints | None = None
    saved: Saved | None = None
    position: Position = field(default_factory=Position)
    interruption: Interruption = field(default_factory=Interruption)
    clock: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.progress.noun = self.data.noun
        self.order, self.draws = (torch.Generator().manual_seed(self.recipe.seed) for _ in range(2))

    @property
    def epochs(self) -> int:
        return sum(phase.settings.epochs for phase in self.phases)

    @property
    def trained(self) -> bool:
        """Whether all phases are over."""
        return self.position.epochs_done == self.epochs

    @property
    def elapsed(self) -> float:
        """Seconds of wall-clock time, in all processes that the run was in."""
        return self.position.elapsed + time.perf_counter() - self.clock


@dataclass(frozen=True)
class Share:
    """What this rank trains of a phase.

    Attributes:
        phase: of its own sections only, where sections are divided.
        sections: that it trains.
        ranks: with which it shares the batches; divided sections share nothing.
        owners: section → its rank; empty where sections are not divided.
    """

    phase: TrainingPhase
    sections: Sequence[str]
    ranks: Ranks
    owners: dict[str, int] = field(default_factory=dict)
