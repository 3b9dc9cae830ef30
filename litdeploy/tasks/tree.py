"""Trees: any named tensors, as of a detector, a network with several heads, or a regression.

Values are compared with the teacher's; what they mean, this file does not know. Integers (classes, counts, masks) are
compared for equality and carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from litdeploy.batch import Batch, size_of
from litdeploy.config.spec import AnyInput
from litdeploy.config.target import Tolerance
from litdeploy.errors import NetworkError
from litdeploy.storage.records import BatchParity, Measures
from litdeploy.tasks.task import Batches, Inference, Measure, Task, begun, check_shapes, largest_differences, needed

# A tensor that hardly differs from sample to sample is scaled by its magnitude, of which this is the share.
_LEAST_VARIANCE = 1e-4
# Stands for a relative error that is no number, or has nothing to be relative to.
_MOST_ERROR = 1e6


class Tree(Task[Measures]):
    """Named tensors, compared with the teacher's: the relative error of each, and the mean of them."""

    name = "tree"
    score = Measures
    output = "tensors"
    output_name = "output"
    several = True
    makes = "returns named tensors"
    needs_reference = True
    advice = "Choose another method: --method lit"
    measure = "relative error"
    heading = "Error against latency"
    note = (
        "The relative error of a tensor is the root mean square of its difference from the teacher's, divided by the "
        "root mean square of the teacher's."
    )
    side_by_side = "Relative error to the teacher, of each network"
    measures = (
        Measure("relative_error", "Relative error", " %", 100, 2, better="lower"),
        Measure("equal", "Equal integers", " %", 100, 2),
    )

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return 0

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return ()

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """Mean over the tensors of mse(S, T) / var(T): each counts alike, whatever its unit. What labels would mean is
        not known.

        Raises:
            NetworkError: no tensor is of floating point.
        """
        own, whole = _named(student), _named(teacher)
        losses = []
        for name, expected in whole.items():
            if expected.is_floating_point():
                expected = expected.detach().float()
                scale = torch.maximum(expected.var(correction=0), _LEAST_VARIANCE * expected.square().mean())
                error = (own[name].float() - expected).square().mean()
                losses.append(error / torch.where(scale > 0, scale, torch.ones_like(scale)))
        if not losses:
            raise NetworkError(
                f"its outputs ({', '.join(whole)}) are integers, which carry no gradient: it can be trained by its "
                "sections alone. Leave the output out of the loss: --beta 0"
            )
        return torch.stack(losses).mean()

    def evaluate(
        self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None
    ) -> Measures:
        """`relative_error`, of several tensors also that of each, and of integers `equal`. See `Task.evaluate`."""
        original = needed(reference)
        _, batches = begun(batches)
        sums: dict[str, Tensor] = {}
        integers: set[str] = set()
        samples = 0
        with torch.no_grad():
            for batch, _ in batches:
                found, expected = run(batch), original(batch)
                check_shapes(found, expected)
                for name, wanted in _named(expected).items():
                    if not wanted.is_floating_point():
                        integers.add(name)
                    part = _squares(wanted, _named(found)[name])
                    sums[name] = sums[name] + part if name in sums else part
                samples += size_of(expected)
        ratios = {name: _ratio(*part.tolist()) for name, part in sums.items()}
        errors = {name: math.sqrt(ratio) for name, ratio in ratios.items() if name not in integers}
        equal = {f"equal/{name}": 1 - ratios[name] for name in ratios if name in integers}
        if not errors:
            return Measures(task=self.name, values=equal, images=samples)
        mean = math.fsum(errors.values()) / len(errors)
        each = {f"relative_error/{name}": error for name, error in errors.items()} if len(errors) > 1 else {}
        return Measures(task=self.name, values={"relative_error": mean, **each, **equal}, images=samples)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """|candidate − reference| ≤ atol + rtol · max |reference| of each tensor; the worst is reported. `top1` is the
        least share of equal values in a tensor of integers."""
        check_shapes(found, expected)
        worst: tuple[float, str, float | None, float | None] = (-1.0, "", 0.0, 0.0)
        equal: list[float] = []
        for name, wanted in _named(expected).items():
            wanted, given = wanted.cpu(), _named(found)[name].cpu()
            if not wanted.is_floating_point():
                equal.append((wanted == given).double().mean().item())
                continue
            absolute, relative = largest_differences(wanted.double(), given.double())
            limit = tolerance.atol + tolerance.rtol * (wanted.abs().max().item() if absolute is not None else 0)
            excess = math.inf if absolute is None else absolute / limit if limit else math.inf if absolute else 0.0
            worst = max(worst, (excess, name, absolute, relative), key=lambda each: each[0])
        return BatchParity(
            batch_size=batch_size,
            images=size_of(expected),
            max_absolute=worst[2],
            max_relative=worst[3],
            top1=min(equal, default=None),
            tensor=worst[1] if worst[1] and len(_named(expected)) > 1 else None,
            within=worst[0] <= 1 and min(equal, default=1.0) >= tolerance.top1,
        )


def _named(answer: Batch) -> dict[str, Tensor]:
    return answer if isinstance(answer, dict) else {"output": answer}


def _squares(expected: Tensor, found: Tensor) -> Tensor:
    """Sums of squares of the difference and of the expected values; of integers the number of differing and of all."""
    if not expected.is_floating_point():
        return torch.stack([(expected != found).sum(), torch.full_like(expected, 1, dtype=torch.int64).sum()]).double()
    return torch.stack([(found.double() - expected.double()).square().sum(), expected.double().square().sum()])


def _ratio(error: float, whole: float) -> float:
    """At most the square of `_MOST_ERROR`, which also stands for what is no number."""
    if not error:
        return 0.0
    ratio = error / whole if whole else math.inf
    return min(ratio, _MOST_ERROR**2) if math.isfinite(ratio) else _MOST_ERROR**2
