"""Dense prediction: logits of classes for each pixel (N, C, H, W), as of a segmenter; any resolution.

Shape suffixes: N samples, C classes, H height and W width of the logits; of labels h and w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import BatchParity, Measures
from litdeploy.tasks.classification import Classification, agreement_of
from litdeploy.tasks.task import (
    Batches,
    Inference,
    Measure,
    Task,
    begun,
    divergence,
    finite,
    needed,
    without_labels,
)

_PIXELS_AS_SAMPLES = Classification()


class Dense(Task[Measures]):
    """Logits of classes for each pixel. Without labels: how many pixels have the teacher's class. With label maps
    (N, h, w): pixel accuracy and mean intersection over union (IoU)."""

    name = "dense"
    score = Measures
    output = "class maps"
    output_name = "logits"
    makes = "classifies pixels"
    advice = "Choose another method: --method lit"
    measure = "pixel agreement"
    heading = "Pixels against latency"
    side_by_side = "Pixels with the right class, of each network"
    measures = (
        Measure("pixel_agreement", "Pixels with the teacher's class", " %", 100, 2),
        Measure("pixel_divergence", "KL divergence from the teacher, per pixel", better="lower"),
        Measure("mean_iou", "Mean IoU", " %", 100, 2, labeled=True),
        Measure("pixel_accuracy", "Pixel accuracy", " %", 100, 2, labeled=True),
    )

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return sizes[0] if len(sizes) == 3 and isinstance(sizes[0], int) else None

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return (classes, "height", "width")

    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        if classes:
            raise DataError(
                f"{source} has a label for each image ({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), and "
                f"{spec.name} {self.makes}: label maps are not read from files yet. Leave the labels unused, and the "
                "network is compared with its teacher: --labels none"
            )

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over pixels."""
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        return temperature**2 * divergence(student, teacher, temperature).mean()

    def hard_loss(self, student: Batch, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over the labeled pixels."""
        assert isinstance(student, Tensor)
        return F.cross_entropy(*_labeled(student, labels))

    def evaluate(
        self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None
    ) -> Measures:
        """`pixel_agreement` and `pixel_divergence`, or `mean_iou` and `pixel_accuracy`. See `Task.evaluate`."""
        labels, batches = begun(batches)
        with torch.no_grad():
            if not without_labels(labels):
                return _by_maps(run, batches)
            agreement, apart, samples = agreement_of(run, batches, needed(reference))
        values = {"pixel_agreement": agreement, "pixel_divergence": apart}
        return Measures(task=self.name, values=finite(values), images=samples)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """As of a classifier; `top1` is the share of pixels."""
        return _PIXELS_AS_SAMPLES.compare(expected, found, batch_size, tolerance, spec)


def _labeled(logits_NCHW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the resolution of the label maps, and these with −100, which is not compared, for what is no class.

    Raises:
        DataError: the labels are no maps.
    """
    if labels.dim() != 3:
        raise DataError(
            f"labels of shape {tuple(labels.shape)}: a network that classifies pixels is compared with label maps "
            "(N, H, W), int64. Give those, or no labels"
        )
    if labels.shape[1:] != logits_NCHW.shape[2:]:
        sizes = (int(labels.shape[1]), int(labels.shape[2]))
        logits_NCHW = F.interpolate(logits_NCHW.float(), size=sizes, mode="bilinear", align_corners=False)
    known = (labels >= 0) & (labels < logits_NCHW.shape[1])
    return logits_NCHW, labels.where(known, labels.new_tensor(-100))


def _by_maps(run: Inference, batches: Batches) -> Measures:
    """Pixel accuracy and mean IoU over the classes that occur in labels or answers."""
    counts: Tensor | None = None
    samples = 0
    for batch, labels in batches:
        answer = run(batch)
        assert isinstance(answer, Tensor)
        logits_NChw, labels_Nhw = _labeled(answer, labels)
        classes = logits_NChw.shape[1]
        known = labels_Nhw >= 0
        pairs = labels_Nhw[known] * classes + logits_NChw.argmax(1)[known]
        counted_CC = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        counts = counted_CC if counts is None else counts + counted_CC
        samples += len(labels)
    assert counts is not None
    if not counts.sum():
        raise DataError("no pixel of the label maps has one of the network's classes; the maps hold their numbers.")
    right_C = counts.diagonal().double()
    union_C = counts.sum(0) + counts.sum(1) - right_C
    there = union_C > 0
    accuracy, iou = right_C.sum() / counts.sum(), (right_C[there] / union_C[there]).mean()
    return Measures(task="dense", values={"mean_iou": iou.item(), "pixel_accuracy": accuracy.item()}, images=samples)
