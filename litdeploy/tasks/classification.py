"""Classification: logits (N, K), one class a sample; compared with labels, or without them with the teacher's.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import Accuracy, BatchParity, LabeledParity, Measures
from litdeploy.tasks.task import (
    Batches,
    Curve,
    Inference,
    Measure,
    ScoreRow,
    Task,
    begun,
    check_shapes,
    divergence,
    finite,
    largest_differences,
    needed,
    preferred_split,
    without_labels,
)

# With fewer samples a second decimal would be below the weight of one sample.
_SAMPLES_FOR_TWO_DECIMALS = 10_000
# A teacher this near to chance (as a share of what is above it) has hardly learned anything.
_HARDLY_BETTER = 0.1


Scored = Accuracy | Measures


class Classification(Task[Scored]):
    """Logits of classes. With labels: accuracy. Without: how often the network gives its teacher's class."""

    name = "classification"
    score = Accuracy
    output = "logits"
    output_name = "logits"
    makes = "classifies"
    labeled = True
    advice = "Choose another method: --method lit"
    measure = "accuracy"
    heading = "Accuracy against latency"
    side_by_side = "Top-1 accuracy of each network"
    measures = (
        Measure("agreement", "Same class as the teacher", " %", 100, 2),
        Measure("divergence", "KL divergence from the teacher", better="lower"),
    )
    fused = True

    @property
    def curves(self) -> tuple[Curve, ...]:
        return (Curve("top1", "Validation accuracy, %", "Validation accuracy", "%", 100), *super().curves)

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return (classes,)

    def output_labels(self, spec: NetworkSpec) -> tuple[str, ...]:
        return spec.classes

    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        if attributes:
            raise DataError(
                f"--attributes: are what a generator translates between, and {spec.name} {self.makes}. Name their "
                "column: --label-column NAME"
            )
        if classes and len(classes) != wanted:
            raise DataError(
                f"{source} has {len(classes)} classes ({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), and "
                f"{spec.name} has {wanted}. Give --data the dataset that the network was trained on, or "
                "--label-column where that dataset has several label columns."
            )

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over the batch (Hinton et al., "Distilling the Knowledge in a
        Neural Network", 2015)."""
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        return temperature**2 * divergence(student, teacher, temperature).mean()

    def hard_loss(self, student: Batch, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over the batch."""
        assert isinstance(student, Tensor)
        return F.cross_entropy(student, labels)

    def key(self, score: Scored) -> float:
        return super().key(score) if isinstance(score, Measures) else score.top1

    def chance(self, score: Scored, classes: int) -> float | None:
        if isinstance(score, Measures) or classes < 2:
            return None
        chance = 1 / classes
        return chance if score.top1 < chance + _HARDLY_BETTER * (1 - chance) else None

    def evaluate(self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None) -> Scored:
        """Top-1 accuracy and mean cross-entropy; without labels `agreement` and `divergence`. See `Task.evaluate`."""
        labels, batches = begun(batches)
        if not without_labels(labels):
            return self._accuracy(run, batches)
        with torch.no_grad():
            agreement, apart, samples = agreement_of(run, batches, needed(reference))
        values = {"agreement": agreement, "divergence": apart}
        return Measures(task=self.name, values=finite(values), images=samples)

    def _accuracy(self, run: Inference, batches: Batches) -> Accuracy:
        loss: Tensor | None = None
        hits: Tensor | None = None
        images = 0
        with torch.no_grad():
            for batch, labels_N in batches:
                logits_NK = run(batch)
                assert isinstance(logits_NK, Tensor)
                batch_loss = F.cross_entropy(logits_NK.float(), labels_N, reduction="sum").double()
                batch_hits = (logits_NK.argmax(1) == labels_N).sum()
                loss = batch_loss if loss is None else loss + batch_loss
                hits = batch_hits if hits is None else hits + batch_hits
                images += len(labels_N)
        assert loss is not None
        assert hits is not None
        return Accuracy(top1=hits.item() / images, loss=loss.item() / images, images=images)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """|candidate − reference| ≤ atol + rtol · max |reference|, and the same class on a share of at least top1."""
        assert isinstance(expected, Tensor)
        assert isinstance(found, Tensor)
        expected_NK, found_NK = expected.double().cpu(), found.double().cpu()
        absolute, relative = largest_differences(expected_NK, found_NK)
        largest = expected_NK.abs().max().item()
        top1 = (found_NK.argmax(1) == expected_NK.argmax(1)).double().mean().item()
        near = absolute is not None and absolute <= tolerance.atol + tolerance.rtol * largest
        return BatchParity(
            batch_size=batch_size,
            images=len(expected_NK),
            max_absolute=absolute,
            max_relative=relative,
            top1=top1,
            within=near and top1 >= tolerance.top1,
        )

    def compare_scores(self, reference: Scored, candidate: Scored, tolerance: Tolerance) -> LabeledParity | None:
        if isinstance(reference, Measures) or isinstance(candidate, Measures):
            return None
        images = reference.images
        lost = round(reference.top1 * images) - round(candidate.top1 * images)
        return LabeledParity(
            reference=reference, candidate=candidate, lost=lost, within=lost <= max(1, tolerance.accuracy * images)
        )

    def agreeing(self, expected: Batch, found: Batch) -> int:
        assert isinstance(expected, Tensor)
        assert isinstance(found, Tensor)
        return int((found.argmax(1) == expected.argmax(1)).sum())

    def split(self, teacher: Mapping[str, Scored], student: Mapping[str, Scored]) -> str | None:
        if _unlabeled(teacher, student):
            return super().split(teacher, student)
        return preferred_split(teacher, student)

    def figure(self, score: Scored | None) -> str:
        if isinstance(score, Measures):
            return super().figure(score)
        return "not measured" if score is None else f"{100 * score.top1:.{decimals(score.images)}f} %"

    def rows(self, teacher: Mapping[str, Scored], student: Mapping[str, Scored]) -> list[ScoreRow]:
        if _unlabeled(teacher, student):
            return super().rows(teacher, student)
        rows = []
        for split in sorted(teacher.keys() | student.keys()):
            before, after = teacher.get(split), student.get(split)
            change = self._change(before, after) if before and after else "–"
            rows.append(ScoreRow(f"Accuracy, {split}", self.figure(before), self.figure(after), change))
        return rows

    def headline(self, teacher: Mapping[str, Scored], student: Mapping[str, Scored]) -> tuple[str, str, str] | None:
        if _unlabeled(teacher, student):
            return super().headline(teacher, student)
        split = self.split(teacher, student)
        if split is None:
            return None
        before, after = teacher[split], student[split]
        return "Accuracy", self._change(before, after), f"{self.figure(before)} → {self.figure(after)}, {split}"

    def verdict(self, teacher: Mapping[str, Scored], student: Mapping[str, Scored], classes: int = 0) -> str:
        if _unlabeled(teacher, student):
            return super().verdict(teacher, student, classes)
        split = self.split(teacher, student)
        if split is None:
            return ", and what that cost in accuracy was not measured"
        before, after = teacher[split], student[split]
        assert isinstance(before, Accuracy)
        assert isinstance(after, Accuracy)
        places = decimals(min(before.images, after.images))
        shown = f"{100 * before.top1:.{places}f} → {100 * after.top1:.{places}f} % on the {split} split"
        guessing = self.chance(before, classes)
        if guessing is not None:
            return (
                f"; what that cost is unknown: the teacher's own accuracy ({shown}) is hardly better than guessing "
                f"({100 * guessing:.{places}f} %), so its input or the labels are not what it was trained on"
            )
        change = self.points(before, after)
        if not change:
            return f", at the same accuracy ({shown})"
        return f", at {abs(change):.{places}f} points {'more' if change > 0 else 'less'} accuracy ({shown})"

    def points(self, before: Scored, after: Scored) -> float | None:
        if isinstance(before, Measures) or isinstance(after, Measures):
            return None
        places = decimals(min(before.images, after.images))
        return round(round(100 * after.top1, places) - round(100 * before.top1, places), places)

    def interval(self, score: Scored) -> tuple[float, float] | None:
        """Wilson's interval (J. Am. Stat. Assoc. 1927)."""
        if isinstance(score, Measures):
            return None
        n, p, z = score.images, score.top1, NormalDist().inv_cdf(0.975)
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, center - reach), min(1.0, center + reach)

    def _change(self, before: Scored, after: Scored) -> str:
        """Points from one accuracy to another: `−2.05 points`."""
        change = self.points(before, after)
        if not change:
            return "±0 points"
        return f"{change:+.{decimals(min(before.images, after.images))}f} points".replace("-", "−")


def _unlabeled(*sides: Mapping[str, Scored]) -> bool:
    return any(isinstance(score, Measures) for side in sides for score in side.values())


def agreement_of(run: Inference, batches: Batches, reference: Inference) -> tuple[float, float, int]:
    """Share of the places of logits (N, C, …) with the same class on both sides, their mean KL(T ‖ S) in nats, and the
    number of samples."""
    sums: Tensor | None = None
    samples = places = 0
    for batch, _ in batches:
        found, expected = run(batch), reference(batch)
        check_shapes(found, expected)
        assert isinstance(found, Tensor)
        assert isinstance(expected, Tensor)
        same = (found.argmax(1) == expected.argmax(1)).sum().double()
        both = torch.stack([same, divergence(found.double(), expected.double()).sum()])
        sums = both if sums is None else sums + both
        samples += len(found)
        places += found[:, 0].numel()
    assert sums is not None
    agreement, mean = (sums / places).tolist()
    return agreement, mean, samples


def decimals(samples: int) -> int:
    """Decimals of a percentage of that many samples."""
    return 2 if samples >= _SAMPLES_FOR_TWO_DECIMALS else 1
