"""Classification: logits (N, K), one class a sample.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import Accuracy, BatchParity, LabeledParity
from litdeploy.tasks.task import Curve, Inference, ScoreRow, Task, largest_differences, preferred_split

# With fewer samples a second decimal would be below the weight of one sample.
_SAMPLES_FOR_TWO_DECIMALS = 10_000
# A teacher this near to chance (as a share of what is above it) has hardly learned anything.
_HARDLY_BETTER = 0.1


class Classification(Task[Accuracy]):
    """Logits of classes, compared with labels: accuracy."""

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
    curve: ClassVar[Curve] = Curve("top1", "Validation accuracy, %", "Validation accuracy", "%", 100)

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
        if len(classes) != wanted:
            raise DataError(
                f"{source} has {len(classes)} classes ({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), and "
                f"{spec.name} has {wanted}. Give --data the dataset that the network was trained on, or "
                "--label-column where that dataset has several label columns."
            )

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
        """L_KD = α · CE(S, y) + (1 − α) · τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over the batch (Hinton et al.,
        "Distilling the Knowledge in a Neural Network", 2015)."""
        hard = F.cross_entropy(student, labels)
        soft = F.kl_div(
            F.log_softmax(student / temperature, dim=-1),
            F.log_softmax(teacher.detach() / temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return alpha * hard + (1 - alpha) * temperature**2 * soft

    def key(self, score: Accuracy) -> float:
        return score.top1

    def chance(self, score: Accuracy, classes: int) -> float | None:
        chance = 1 / classes
        return chance if score.top1 < chance + _HARDLY_BETTER * (1 - chance) else None

    def evaluate(
        self,
        run: Inference,
        batches: Iterable[tuple[Batch, Tensor]],
        spec: AnyInput,
        reference: Inference | None = None,
    ) -> Accuracy:
        """Top-1 accuracy and mean cross-entropy. See `Task.evaluate`."""
        loss: Tensor | None = None
        hits: Tensor | None = None
        images = 0
        with torch.no_grad():
            for batch, labels_N in batches:
                logits_NK = run(batch)
                batch_loss = F.cross_entropy(logits_NK.float(), labels_N, reduction="sum").double()
                batch_hits = (logits_NK.argmax(1) == labels_N).sum()
                loss = batch_loss if loss is None else loss + batch_loss
                hits = batch_hits if hits is None else hits + batch_hits
                images += len(labels_N)
        if loss is None or hits is None:
            raise DataError(
                "there is nothing to evaluate on: the split is empty. Give --data a dataset with this split."
            )
        return Accuracy(top1=hits.item() / images, loss=loss.item() / images, images=images)

    def compare(
        self, expected: Tensor, found: Tensor, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """|candidate − reference| ≤ atol + rtol · max |reference|, and the same class on a share of at least top1."""
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

    def compare_scores(self, reference: Accuracy, candidate: Accuracy, tolerance: Tolerance) -> LabeledParity:
        images = reference.images
        lost = round(reference.top1 * images) - round(candidate.top1 * images)
        return LabeledParity(
            reference=reference, candidate=candidate, lost=lost, within=lost <= max(1, tolerance.accuracy * images)
        )

    def agreeing(self, expected: Tensor, found: Tensor) -> int:
        return int((found.argmax(1) == expected.argmax(1)).sum())

    def split(self, teacher: Mapping[str, Accuracy], student: Mapping[str, Accuracy]) -> str | None:
        return preferred_split(teacher, student)

    def figure(self, score: Accuracy | None) -> str:
        return "not measured" if score is None else f"{100 * score.top1:.{decimals(score.images)}f} %"

    def rows(self, teacher: Mapping[str, Accuracy], student: Mapping[str, Accuracy]) -> list[ScoreRow]:
        rows = []
        for split in sorted(teacher.keys() | student.keys()):
            before, after = teacher.get(split), student.get(split)
            change = self._change(before, after) if before and after else "–"
            rows.append(ScoreRow(f"Accuracy, {split}", self.figure(before), self.figure(after), change))
        return rows

    def headline(self, teacher: Mapping[str, Accuracy], student: Mapping[str, Accuracy]) -> tuple[str, str, str] | None:
        split = self.split(teacher, student)
        if split is None:
            return None
        before, after = teacher[split], student[split]
        return "Accuracy", self._change(before, after), f"{self.figure(before)} → {self.figure(after)}, {split}"

    def verdict(self, teacher: Mapping[str, Accuracy], student: Mapping[str, Accuracy]) -> str:
        split = self.split(teacher, student)
        if split is None:
            return ", and what that cost in accuracy was not measured"
        before, after = teacher[split], student[split]
        places = decimals(min(before.images, after.images))
        shown = f"{100 * before.top1:.{places}f} → {100 * after.top1:.{places}f} % on the {split} split"
        change = self.points(before, after)
        if change == 0:
            return f", at the same accuracy ({shown})"
        return f", at {abs(change):.{places}f} points {'more' if change > 0 else 'less'} accuracy ({shown})"

    def points(self, before: Accuracy, after: Accuracy) -> float:
        places = decimals(min(before.images, after.images))
        return round(round(100 * after.top1, places) - round(100 * before.top1, places), places)

    def interval(self, score: Accuracy) -> tuple[float, float]:
        """Wilson's interval (J. Am. Stat. Assoc. 1927)."""
        n, p, z = score.images, score.top1, NormalDist().inv_cdf(0.975)
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, center - reach), min(1.0, center + reach)

    def _change(self, before: Accuracy, after: Accuracy) -> str:
        """Points from one accuracy to another: `−2.05 points`."""
        change = self.points(before, after)
        if not change:
            return "±0 points"
        return f"{change:+.{decimals(min(before.images, after.images))}f} points".replace("-", "−")


def decimals(samples: int) -> int:
    """Decimals of a percentage of that many samples."""
    return 2 if samples >= _SAMPLES_FOR_TWO_DECIMALS else 1
