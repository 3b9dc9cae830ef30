from __future__ import annotations

import math

import pytest
import torch

from litdeploy.config.spec import InputSpec
from litdeploy.errors import DataError
from litdeploy.tasks import TASKS

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,))


def test_batches_of_unlike_sizes_count_by_image() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    found = TASKS["classification"].evaluate(lambda batch: batch, batches, SPEC)
    right, wrong = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    assert found.images == 4
    assert found.top1 == 3 / 4
    assert found.loss == pytest.approx((2 * right + wrong + math.log(2)) / 4)


def test_a_mean_over_many_batches_keeps_its_digits() -> None:
    logits, labels = torch.tensor([[0.0, 0.1]]), torch.tensor([1])
    found = TASKS["classification"].evaluate(lambda batch: batch, [(logits, labels)] * 20_000, SPEC)
    assert found.loss == pytest.approx(math.log1p(math.exp(-0.1)), rel=1e-6)


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate on"):
        TASKS["classification"].evaluate(lambda batch: batch, [], SPEC)
