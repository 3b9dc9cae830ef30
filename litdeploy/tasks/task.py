"""The contract of a task: what a network's output means.

Code outside this package never asks which task a network has; it asks the task:

    task = task_of(network.spec)
    score = task.evaluate(runner.run, batches, network.spec.input)

`task_of` finds it from a network's spec or its input, `task_of_scores` from scores, in reports, which hold no spec.

| who asks | what |
|---|---|
| data | `check_classes`, `inputs`, `any_size` |
| trainer | `loss`, `check_objective`, `training_inputs`, `repeats`, `evaluate`, `key`, `chance`, `write_samples` |
| exporter, runtime | `output_name`, `output_shape`, `output_labels`, `class_count` |
| parity, verify, fidelity | `compare`, `compare_scores`, `agreeing`, `evaluate` |
| reports | `split`, `figure`, `rows`, `headline`, `verdict`, `points`, `interval`, `curve`, and words |
| messages | `output`, `makes`, `labeled`, `measure`, `advice` |

The trainer's fused kernels compute the same as `loss`, which defines it. A new task is a file with one class, and one
row of `TASKS`; if its score is a new record, that is a class in `storage/records.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import StudentError
from litdeploy.storage.records import BatchParity, LabeledParity, Record

S = TypeVar("S", bound=Record)

# What a network takes → its output.
Inference = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class ScoreRow:
    """One figure of both networks, as a report's table has it; `–` for one that there is not."""

    label: str
    teacher: str
    student: str
    change: str


@dataclass(frozen=True)
class Curve:
    """The metric whose course over the epochs is drawn.

    Attributes:
        metric: its key in a line of metrics.jsonl, after the split: `top1`.
        title: above the chart.
        name: in its title for screen readers, before "over the epochs".
        unit: of an axis label.
        factor: from the value to that unit.
    """

    metric: str
    title: str
    name: str
    unit: str
    factor: float = 1.0


class Task(ABC, Generic[S]):
    """What an output means: how it is trained for, measured, compared and named. Stateless; one instance a task.

    Attributes:
        name: its row in `TASKS`.
        score: the record of its metric.
        output: what the output is: `logits`, `images`.
        output_name: of the output in an exported file.
        makes: what the network does, after its name in messages: "makes images".
        labeled: whether the metric compares with labels, so that the network's accuracy is defined.
        needs_reference: whether the metric compares with another network's outputs.
        repeats: whether the same view of a sample gives the same output at each epoch.
        any_size: whether its networks take images of any size.
        samples: number of samples on its sample sheet; 0: it draws none.
        advice: what to type instead of an objective that does not fit.
        measure: what its metric is called in a sentence.
        heading, note: of the report's section on it; the note may be empty.
        side_by_side: title of its table when two reports are compared.
        curve: its metric over the epochs.
    """

    name: ClassVar[str]
    score: type[S]
    output: ClassVar[str]
    output_name: ClassVar[str]
    makes: ClassVar[str]
    labeled: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    samples: ClassVar[int] = 0
    advice: ClassVar[str]
    measure: ClassVar[str]
    heading: ClassVar[str]
    note: ClassVar[str] = ""
    side_by_side: ClassVar[str]
    curve: ClassVar[Curve]

    # Shape and labels of the output.

    @abstractmethod
    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        """Number of classes (or domains) of an output of these sizes, without the batch; None if they do not fit."""

    @abstractmethod
    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        """Sizes of the output of one sample."""

    def output_labels(self, spec: NetworkSpec) -> tuple[str, ...]:
        """Names of the output's places, in their order; empty if they have none."""
        return ()

    # Data.

    @abstractmethod
    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        """Check a dataset's classes against a network.

        Args:
            source: what messages call the dataset.
            classes: its classes, domains or attributes.
            attributes: whether several of them may hold for one sample.
            wanted: the network's number of classes or domains.

        Raises:
            DataError: the network has other ones.
        """

    def inputs(self, inputs: Batch, labels: Tensor | None, spec: AnyInput, first: int = 0) -> Batch:
        """All that the network takes of a batch to measure by: the samples, and what is asked of it for them.

        Args:
            inputs: the prepared samples.
            labels: of the samples, int64.
            first: position of the first of them in its split.
        """
        return inputs

    def training_inputs(self, inputs: Batch, labels: Tensor, spec: AnyInput) -> Batch:
        """The same to train by."""
        return inputs

    # Training.

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
        """L_KD: the loss of a student's output (weight 1 − alpha: to its teacher's, alpha: to the labels), a scalar.

        Args:
            student, teacher: float32; the teacher's carries no gradient.
            temperature: τ, which both sides' logits are divided by.
        """

    def check_objective(self, learns_by: str, what: str, network: str) -> None:
        """Check that an objective can learn from these outputs.

        Args:
            learns_by: an output (`logits`, `images`), or `sections`, which every network has.
            what: the objective, for the message: `--method kd: its phase 'kd'`.
            network: name of the network.

        Raises:
            StudentError: it cannot.
        """
        if learns_by not in ("sections", self.output):
            outputs = {"logits": "logits of classes"}.get(learns_by, learns_by)
            raise StudentError(f"{what} learns by {outputs}, and {network} {self.makes}. {self.advice}")

    @abstractmethod
    def key(self, score: S) -> float:
        """The number to compare scores by: of two, the larger is the better. NaN is the worst."""

    def chance(self, score: S, classes: int) -> float | None:
        """The score that guessing reaches, if this one is hardly better; else None."""
        return None

    def write_samples(
        self,
        path: Path,
        teacher: nn.Module,
        student: nn.Module,
        inputs: Batch,
        labels: Tensor,
        spec: AnyInput,
        classes: Sequence[str],
    ) -> bool:
        """Draw `samples` samples as both networks answer them, as a PNG file.

        Args:
            teacher, student: in eval mode, on the samples' device.

        Returns:
            Whether the library that draws them is installed; without it, nothing is written.
        """
        return False

    # Measuring.

    @abstractmethod
    def evaluate(
        self,
        run: Inference,
        batches: Iterable[tuple[Batch, Tensor]],
        spec: AnyInput,
        reference: Inference | None = None,
    ) -> S:
        """Measure how good a network is.

        Sums stay on the device and are read once, at the end.

        Args:
            run: the network.
            batches: (what it takes, labels (N) or of attributes (N, K), int64), on the device of `run`.
            reference: the teacher; see `needs_reference`.

        Raises:
            DataError: there are no batches.
            RunnerError: the outputs of both are not of one shape.
        """

    @abstractmethod
    def compare(
        self, expected: Tensor, found: Tensor, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """Compare a candidate's outputs with the reference's for the same inputs."""

    def compare_scores(self, reference: S, candidate: S, tolerance: Tolerance) -> LabeledParity | None:
        """Compare two scores on the same labeled samples; None if the metric compares with no labels."""
        return None

    def agreeing(self, expected: Tensor, found: Tensor) -> int | None:
        """Number of samples with the same answer in both outputs; None if an output is no answer to choose."""
        return None

    # Reports. `teacher` and `student` are scores by split.

    @abstractmethod
    def split(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> str | None:
        """The split that a report judges by: `test`, else `validation`; None if neither has what is needed."""

    @abstractmethod
    def figure(self, score: S | None) -> str:
        """The score with as many digits as its number of samples allows."""

    @abstractmethod
    def rows(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> list[ScoreRow]:
        """Rows of the table that compares both networks."""

    @abstractmethod
    def headline(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> tuple[str, str, str] | None:
        """(name, figure, small print) at the head of a report; None if there is nothing to show."""

    @abstractmethod
    def verdict(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> str:
        """The end of the sentence on speed that says what the speed cost, with its comma or semicolon."""

    def points(self, before: S, after: S) -> float | None:
        """Percentage points from teacher to student, between the figures as shown; None without labels."""
        return None

    def interval(self, score: S) -> tuple[float, float] | None:
        """95 % interval of the share of correct answers, 0–1; None without labels."""
        return None


def preferred_split(*sides: Mapping[str, object]) -> str | None:
    """`test`, else `validation`: the first that all sides have."""
    return next((name for name in ("test", "validation") if all(name in side for side in sides)), None)


def largest_differences(expected: Tensor, found: Tensor) -> tuple[float | None, float | None]:
    """The largest difference, and that over the largest magnitude; None both if a value is NaN or infinite."""
    if not (expected.isfinite().all() and found.isfinite().all()):
        return None, None
    absolute = (found - expected).abs().max().item()
    # Values that are all 0 leave nothing to divide by; any difference from them is then as large as can be.
    return absolute, absolute / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
