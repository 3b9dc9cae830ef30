"""Does an artefact compute what the network computes? Running and comparing, apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Tolerance
from litdeploy.networks.batch import Batch, device_of, in_parts, picked, size_of
from litdeploy.runtime import Runner, accuracy
from litdeploy.runtime.likeness import of_images
from litdeploy.storage.records import Accuracy, Likeness, Record

# A batch size. Small batches compute what large ones do with other kernels: a few images tell, and 64 calls of one
# image are minutes for a deep network on a busy processor.
_MOST_CALLS = 16


class BatchParity(Record):
    """How far two runners are apart at one batch size.

    Attributes:
        images: how many were compared.
        max_absolute: largest difference of two logits; None where a logit of either is NaN or infinite.
        max_relative: the same, divided by the largest magnitude in the reference's logits.
        top1: share of images on which both give the same class; None where they make images.
        likeness: how near the candidate's images come to the reference's; None where they tell classes apart.
        within: whether the tolerance is kept.
    """

    batch_size: int
    images: int
    max_absolute: float | None
    max_relative: float | None
    top1: float | None
    likeness: Likeness | None = None
    within: bool

    def alike(self) -> str:
        """How alike both are, for people, before "samples"."""
        if self.top1 is not None:
            return f"same class on {self.top1:.2%} of"
        return f"{self.likeness.told()} over" if self.likeness else "not comparable over"


class TaskAccuracy(Record):
    """What the network is for: accuracy of both on the same images.

    Attributes:
        lost: images that the reference has right, less those that the candidate has right.
        within: whether no more were lost than the tolerance allows.
    """

    reference: Accuracy
    candidate: Accuracy
    lost: int
    within: bool


class Parity(Record):
    """How far a candidate is from its reference.

    Attributes:
        reference, candidate: names of the runners.
        tolerance: the limits.
        accuracy: on labelled images; None where there were none.
        within: whether the limits are kept, at every batch size.
    """

    reference: str
    candidate: str
    tolerance: Tolerance
    batches: tuple[BatchParity, ...]
    accuracy: TaskAccuracy | None = None
    within: bool

    @property
    def top1(self) -> float | None:
        """Share of all images, over all batch sizes, on which both give the same class; None where they make images.

        It is judged, and not that of each batch size: calls of one image see few images.
        """
        return same_class(self.batches)

    def with_accuracy(self, task: TaskAccuracy) -> Parity:
        """The same, judged by the accuracy too."""
        return self.model_copy(update={"accuracy": task, "within": self.within and task.within})

    def told(self) -> str:
        """Figures and limits, in one sentence a batch size."""
        lines = []
        for each in self.batches:
            if each.max_absolute is None or each.max_relative is None:
                difference = "a value is NaN or infinite"
            else:
                difference = f"largest difference {each.max_absolute:.2e} ({each.max_relative:.2e} of the largest)"
            lines.append(
                f"  batch {each.batch_size}: {difference}, {each.alike()} {each.images} samples"
                + ("" if each.within else "  ← beyond the limit")
            )
        if self.top1 is not None and self.top1 < self.tolerance.top1:
            lines.append(f"  same class on {self.top1:.2%} of all  ← beyond the limit")
        if self.accuracy is not None:
            both = self.accuracy
            lines.append(
                f"  accuracy on {both.reference.images} samples: {both.reference.top1:.2%} → {both.candidate.top1:.2%}"
                + ("" if both.within else "  ← beyond the limit")
            )
        limits = self.tolerance
        if self.top1 is None:
            return "\n".join([*lines, f"  limit: PSNR at least {limits.psnr:g} dB, SSIM at least {limits.ssim:g}"])
        lines.append(
            f"  limit: {limits.atol:g} + {limits.rtol:g} of the largest logit, same class on at least {limits.top1:.2%}"
            + (f", accuracy at most {limits.accuracy:.2%} lower" if self.accuracy is not None else "")
        )
        return "\n".join(lines)


def verify(
    reference: Runner,
    candidate: Runner,
    inputs: Batch,
    batch_sizes: Sequence[int],
    tolerance: Tolerance,
    labels_N: Tensor | None = None,
    images: InputSpec | None = None,
) -> Parity:
    """Runs both on the same images, in calls of each batch size, and compares.

    Args:
        reference, candidate: open, on one device.
        inputs: what the network takes, on that device; at least one. Repeated where a batch takes more.
        batch_sizes: each sees as many whole batches as the images fill, at least one and at most sixteen.
        labels_N: of the images, int64; None: no accuracy is measured.
        images: what the images are like that both make; None: they give logits.
    """
    batches = []
    for size in batch_sizes:
        calls = min(max(1, size_of(inputs) // size), _MOST_CALLS)
        rows = torch.arange(calls * size, device=device_of(inputs)) % size_of(inputs)
        parts = [picked(inputs, some) for some in torch.split(rows, size)]
        outputs = [torch.cat([runner.run(part) for part in parts]) for runner in (reference, candidate)]
        if images is not None:
            batches.append(compare_images(outputs[0], outputs[1], size, tolerance, images))
            continue
        batches.append(compare(outputs[0], outputs[1], size, tolerance.model_copy(update={"top1": 0.0})))
    top1 = same_class(batches)
    parity = Parity(
        reference=reference.name,
        candidate=candidate.name,
        tolerance=tolerance,
        batches=tuple(batches),
        within=all(batch.within for batch in batches) and (top1 is None or top1 >= tolerance.top1),
    )
    if labels_N is None:
        return parity
    size = max(batch_sizes)
    labelled = list(zip(in_parts(inputs, size), torch.split(labels_N, size), strict=True))
    return parity.with_accuracy(
        compare_accuracy(accuracy(reference.run, labelled), accuracy(candidate.run, labelled), tolerance)
    )


def same_class(batches: Sequence[BatchParity]) -> float | None:
    """Share of all images on which both give the same class; None where they make images."""
    same = [batch.top1 * batch.images for batch in batches if batch.top1 is not None]
    return sum(same) / sum(batch.images for batch in batches) if same else None


def compare_accuracy(reference: Accuracy, candidate: Accuracy, tolerance: Tolerance) -> TaskAccuracy:
    """Accuracy against accuracy, on the same images."""
    images = reference.images
    lost = round(reference.top1 * images) - round(candidate.top1 * images)
    return TaskAccuracy(
        reference=reference, candidate=candidate, lost=lost, within=lost <= max(1, tolerance.accuracy * images)
    )


def compare(reference: Tensor, candidate: Tensor, batch_size: int, tolerance: Tolerance) -> BatchParity:
    """Compares logits (N, classes) with logits: |candidate − reference| ≤ atol + rtol · max |reference|."""
    expected, found = reference.double().cpu(), candidate.double().cpu()
    absolute, relative = _differences(expected, found)
    largest = expected.abs().max().item()
    top1 = (found.argmax(1) == expected.argmax(1)).double().mean().item()
    near = absolute is not None and absolute <= tolerance.atol + tolerance.rtol * largest
    return BatchParity(
        batch_size=batch_size,
        images=len(expected),
        max_absolute=absolute,
        max_relative=relative,
        top1=top1,
        within=near and top1 >= tolerance.top1,
    )


def compare_images(
    reference: Tensor, candidate: Tensor, batch_size: int, tolerance: Tolerance, images: InputSpec
) -> BatchParity:
    """Compares images (N, C, H, W) with images, by PSNR and SSIM."""
    expected, found = reference.double().cpu(), candidate.double().cpu()
    absolute, relative = _differences(expected, found)
    likeness = None if absolute is None else of_images(expected, found, images)
    return BatchParity(
        batch_size=batch_size,
        images=len(expected),
        max_absolute=absolute,
        max_relative=relative,
        top1=None,
        likeness=likeness,
        within=likeness is not None and likeness.psnr >= tolerance.psnr and likeness.ssim >= tolerance.ssim,
    )


def _differences(expected: Tensor, found: Tensor) -> tuple[float | None, float | None]:
    """The largest difference, and that over the largest magnitude; None both where a value is NaN or infinite."""
    if not (expected.isfinite().all() and found.isfinite().all()):
        return None, None
    absolute = (found - expected).abs().max().item()
    # Values that are all 0 leave nothing to divide by; any difference from them is then as large as can be.
    return absolute, absolute / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
