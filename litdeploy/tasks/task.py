"""The contract of a task: what a network's output means.

Code outside this package never asks which task a network has; it asks the task:

    task = task_of(network.spec)
    score = task.evaluate(runner.run, batches, network.spec.input)

A score is a record of the task's own (`Accuracy`, `Likeness`), or `Measures`, whose reports are made here from what the
task declares in `measures`: a new task needs no code for them.

`task_of` finds it from a network's spec or its input, `task_of_scores` from scores, in reports, which hold no spec.

| who asks | what |
|---|---|
| data | `check_classes`, `inputs`, `any_size` |
| trainer | `loss`, `fused`, `check_objective`, `repeats`, `training_inputs`, `evaluate`, `key`, `chance`, |
| | `write_samples` |
| exporter, runtime | `output_name`, `several`, `output_shape`, `output_labels`, `class_count` |
| parity, verify, fidelity | `compare`, `compare_scores`, `agreeing`, `evaluate` |
| reports | `split`, `figure`, `rows`, `headline`, `verdict`, `points`, `interval`, `curves`, and words |
| messages | `output`, `makes`, `labeled`, `measure`, `advice` |

The trainer's fused kernels compute the same as `loss`, which defines it. A new task is a file with one class, and one
row of `TASKS`; if its score is a new record, that is a class in `storage/records.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput, NetworkSpec, TaskName
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError, RunnerError, StudentError
from litdeploy.storage.records import BatchParity, LabeledParity, Measures, Record

S = TypeVar("S", bound=Record)

# What a network takes → its answer (`networks.output.answer_of`).
Inference = Callable[[Batch], Batch]
# (what a network takes, labels (N) or of attributes (N, K), int64).
Batches = Iterable[tuple[Batch, Tensor]]


@dataclass(frozen=True)
class ScoreRow:
    """One figure of both networks, as a report's table has it; `–` for one that there is not."""

    label: str
    teacher: str
    student: str
    change: str


@dataclass(frozen=True)
class Measure:
    """A value in `Measures`.

    Attributes:
        name: its key there; that of one tensor is `NAME/TENSOR`.
        label: in a table, and in lower case in a sentence: `Agreement with the teacher`.
        unit: after the figure, with its space: ` %`.
        factor: from the value to that unit.
        decimals: of the figure.
        better: the direction of better values.
        labeled: whether it compares with labels; it is then measured of the teacher too.
    """

    name: str
    label: str
    unit: str = ""
    factor: float = 1.0
    decimals: int = 4
    better: Literal["higher", "lower"] = "higher"
    labeled: bool = False

    def figure(self, value: float | None) -> str:
        """`98.21 %`, or a dash."""
        return "–" if value is None else f"{self.factor * value:.{self.decimals}f}{self.unit}"

    def change(self, before: float | None, after: float | None) -> str:
        """`−0.42`, in percentage points if the unit is percent; a dash if one is missing."""
        if before is None or after is None:
            return "–"
        unit = " points" if self.unit == " %" else self.unit
        return f"{self.factor * (after - before):+.{self.decimals}f}{unit}".replace("-", "−")

    @property
    def curve(self) -> Curve:
        """Its course over the epochs."""
        unit = self.unit.strip()
        return Curve(self.name, f"{self.label} on validation{', ' * bool(unit)}{unit}", self.label, unit, self.factor)


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
        several: whether the answer is every output of a file, by name; else it is the first.
        makes: what the network does, after its name in messages: "makes images".
        labeled: whether the metric compares with labels, so that the network's accuracy is defined.
        needs_labels: whether its networks take the labels as an input, so that they need data with labels.
        needs_reference: whether the metric compares with another network's outputs.
        repeats: whether the same view of a sample gives the same output at each epoch.
        any_size: whether its networks take images of any size.
        samples: number of samples on its sample sheet; 0: it draws none.
        advice: what to type instead of an objective that does not fit.
        measure: what its metric is called in a sentence.
        heading, note: of the report's section on it; the note may be empty.
        side_by_side: title of its table when two reports are compared.
        curves: its metrics over the epochs that are drawn.
        measures: what its `Measures` may hold, the main one first.
        embeds: whether its answers are embeddings.
        fused: whether the trainer's kernels compute its loss.
    """

    name: ClassVar[TaskName]
    score: type[S]
    output: ClassVar[str]
    output_name: ClassVar[str]
    several: ClassVar[bool] = False
    makes: ClassVar[str]
    labeled: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    samples: ClassVar[int] = 0
    advice: ClassVar[str]
    measure: ClassVar[str]
    heading: ClassVar[str]
    note: ClassVar[str] = ""
    side_by_side: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]] = ()
    embeds: ClassVar[bool] = False
    fused: ClassVar[bool] = False

    @property
    def curves(self) -> tuple[Curve, ...]:
        return tuple(each.curve for place, each in enumerate(self.measures) if not place or each.labeled)

    def needs_teacher(self, labeled: bool) -> bool:
        """Whether its metric on data with or without labels compares with the teacher's outputs."""
        return self.needs_reference or not labeled

    # Shape and labels of the output.

    @abstractmethod
    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        """Number of classes (or domains) of an output of these sizes, without the batch; 0 if it has none, None if they
        do not fit."""

    @abstractmethod
    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        """Sizes of the output of one sample."""

    def output_labels(self, spec: NetworkSpec) -> tuple[str, ...]:
        """Names of the output's places, in their order; empty if they have none."""
        return ()

    # Data.

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
        if classes:
            raise DataError(
                f"{source} has labels ({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), and {spec.name} "
                f"{self.makes}, which are not compared with classes. Leave the labels unused: --labels none"
            )

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

    def loss(
        self,
        student: Batch,
        teacher: Batch,
        labels: Tensor,
        alpha: float,
        temperature: float,
        inputs: Batch | None = None,
    ) -> Tensor:
        """L_KD = α · hard_loss + (1 − α) · soft_loss, a scalar; soft_loss alone if labels have no part in it.

        Args:
            student, teacher: answers, float32; the teacher's carries no gradient.
            labels: int64; not read if alpha is 0; −1 without labels, and alpha is then 0.
            temperature: τ, which both sides' logits are divided by.
            inputs: what both took, for their masks.
        """
        soft = self.soft_loss(student, teacher, temperature, inputs)
        hard = self.hard_loss(student, labels) if alpha else None
        return soft if hard is None else alpha * hard + (1 - alpha) * soft

    @abstractmethod
    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """The loss of a student's answer to its teacher's; arguments as of `loss`."""

    def hard_loss(self, student: Batch, labels: Tensor) -> Tensor | None:
        """The loss of a student's answer to the labels; None if labels have no part in the loss."""
        return None

    def check_objective(self, learns_by: str, what: str, network: str) -> None:
        """Check that an objective can learn from these outputs.

        Args:
            learns_by: logits of classes (`logits`), `images`, whichever `output` the task's loss compares, or
                `sections`, which every network has.
            what: the objective, for the message: `--method kd: its phase 'kd'`.
            network: name of the network.

        Raises:
            StudentError: it cannot.
        """
        if learns_by not in ("sections", "output", self.output):
            outputs = {"logits": "logits of classes", "output": "logits of classes"}.get(learns_by, learns_by)
            raise StudentError(f"{what} learns by {outputs}, and {network} {self.makes}. {self.advice}")

    def key(self, score: S) -> float:
        """The number to compare scores by: of two, the larger is the better. NaN is the worst."""
        name, value = next(iter(_values(score).items()))
        return value if self.measure_of(name).better == "higher" else -value

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
    def evaluate(self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None) -> S:
        """Measure how good a network is.

        Sums stay on the device and are read once, at the end.

        Args:
            run: the network.
            batches: on the device of `run`. Labels of −1: there are none, and outputs are compared with the
                reference's.
            reference: the teacher; see `needs_teacher`.

        Raises:
            DataError: there are no batches; or no labels and no reference, if one of the two is needed.
            RunnerError: the outputs of both are not of one shape.
        """

    @abstractmethod
    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """Compare a candidate's outputs with the reference's for the same inputs."""

    def compare_scores(self, reference: S, candidate: S, tolerance: Tolerance) -> LabeledParity | None:
        """Compare two scores on the same labeled samples; None if the metric compares with no labels."""
        return None

    def vectors(self, answer: Batch, inputs: Batch | None) -> Tensor | None:
        """The answer as an embedding of each sample, (N, D); None if it is none. See `embeds`.

        Args:
            inputs: what the network took, for its mask.
        """
        return None

    def agreeing(self, expected: Batch, found: Batch) -> int | None:
        """Number of samples with the same answer in both outputs; None if an output is no answer to choose."""
        return None

    # Reports. `teacher` and `student` are scores by split; here of `Measures`.

    def split(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> str | None:
        """The split that a report judges by: `test`, else `validation`; None if neither has what is needed."""
        return preferred_split(student)

    def figure(self, score: S | None) -> str:
        """The score with as many digits as its number of samples allows."""
        values = _values(score)
        return next((self.measure_of(name).figure(value) for name, value in values.items()), "–")

    def rows(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> list[ScoreRow]:
        """Rows of the table that compares both networks."""
        rows = []
        for split in sorted(teacher.keys() | student.keys()):
            before, after = _values(teacher.get(split)), _values(student.get(split))
            for name in dict.fromkeys([*after, *before]):
                measure, own, students = self.measure_of(name), before.get(name), after.get(name)
                figures = measure.figure(own), measure.figure(students), measure.change(own, students)
                rows.append(ScoreRow(f"{measure.label}, {split}", *figures))
        return rows

    def headline(self, teacher: Mapping[str, S], student: Mapping[str, S]) -> tuple[str, str, str] | None:
        """(name, figure, small print) at the head of a report; None if there is nothing to show."""
        split = self.split(teacher, student)
        values = _values(student.get(split)) if split else {}
        if not values:
            return None
        (name, value), *others = values.items()
        main = self.measure_of(name)
        rest = [f"{self.measure_of(each).label}: {self.measure_of(each).figure(found)}" for each, found in others[:2]]
        return main.label, main.figure(value), "; ".join([*rest, str(split)])

    def verdict(self, teacher: Mapping[str, S], student: Mapping[str, S], classes: int = 0) -> str:
        """The end of the sentence on speed that says what the speed cost, with its comma or semicolon.

        Args:
            classes: their number, to compare with guessing; 0: not known.
        """
        split = self.split(teacher, student)
        values = _values(student.get(split)) if split else {}
        if not values:
            return ", and what that cost was not measured"
        name, value = next(iter(values.items()))
        main = self.measure_of(name)
        unlabeled = "" if any(self.measure_of(each).labeled for each in values) else "; not compared with labels"
        return f"; {main.label[0].lower()}{main.label[1:]}: {main.figure(value)} ({split} split{unlabeled})"

    def measure_of(self, name: str) -> Measure:
        """What a key in `Measures` means; of an unknown one, which a file may have, its name."""
        kind, _, tensor = name.partition("/")
        known = next((each for each in self.measures if each.name == kind), Measure(kind, kind))
        return replace(known, label=f"{known.label}, {tensor}") if tensor else known

    def points(self, before: S, after: S) -> float | None:
        """Percentage points from teacher to student, between the figures as shown; None without labels."""
        return None

    def interval(self, score: S) -> tuple[float, float] | None:
        """95 % interval of the share of correct answers, 0–1; None without labels."""
        return None


def _values(score: Any) -> dict[str, float]:
    return score.values if isinstance(score, Measures) else {}


def preferred_split(*sides: Mapping[str, object]) -> str | None:
    """`test`, else `validation`: the first that all sides have."""
    return next((name for name in ("test", "validation") if all(name in side for side in sides)), None)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The values that a file can hold; the first, the main one, is finite."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def begun(batches: Batches) -> tuple[Tensor, Batches]:
    """The labels of the first batch, and all batches.

    Raises:
        DataError: there is none.
    """
    each = iter(batches)
    first = next(each, None)
    if first is None:
        raise DataError("there is nothing to evaluate on: the split is empty. Give --data a dataset with this split.")
    return first[1], chain([first], each)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(T/τ) ‖ softmax(S/τ)), in nats, of logits (N, C, …) at each place: (N, …). T carries no gradient."""
    own, other = (F.log_softmax(each / temperature, dim=1) for each in (student, teacher.detach()))
    return F.kl_div(own, other, reduction="none", log_target=True).sum(1)


def without_labels(labels: Tensor) -> bool:
    """Whether these labels stand for none: all are negative."""
    return bool(labels.numel()) and int(labels.max()) < 0


def needed(reference: Inference | None) -> Inference:
    """The teacher's inference, which a metric without labels needs.

    Raises:
        DataError: there is none.
    """
    if reference is None:
        raise DataError(
            "there are no labels to compare with, so that the outputs are compared with the teacher's, and no teacher "
            "is given. Name it: --teacher FILE; or give labels (--label-column NAME)"
        )
    return reference


def counted(answer: Tensor, inputs: Batch | None) -> Tensor:
    """1 for each token that counts and 0 for padding, (N, L), of the answer's type: the attention mask of its inputs;
    all count without one.

    Args:
        answer: (N, L, …).
        inputs: what the network took.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if mask is None or mask.shape != answer.shape[:2]:
        return answer.new_ones(answer.shape[:2])
    return mask.to(answer.dtype)


def check_shapes(found: Batch, expected: Batch) -> None:
    """Check that a network's and its teacher's outputs can be compared.

    Raises:
        RunnerError: they have different names or shapes.
    """
    shapes = []
    for answer in (found, expected):
        named = answer if isinstance(answer, dict) else {"": answer}
        shapes.append({name: tuple(tensor.shape) for name, tensor in named.items()})
    if shapes[0] != shapes[1]:
        given, wanted = (", ".join(f"{name} {shape}".strip() for name, shape in each.items()) for each in shapes)
        raise RunnerError(
            f"outputs of {given} cannot be compared with outputs of {wanted}: the files are not of one network. Export "
            "the student again, or name its own teacher: --teacher FILE"
        )


def largest_differences(expected: Tensor, found: Tensor) -> tuple[float | None, float | None]:
    """The largest difference, and that over the largest magnitude; None both if a value is NaN or infinite."""
    if not (expected.isfinite().all() and found.isfinite().all()):
        return None, None
    absolute = (found - expected).abs().max().item()
    # Values that are all 0 leave nothing to divide by; any difference from them is then as large as can be.
    return absolute, absolute / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
