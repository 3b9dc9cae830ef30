from __future__ import annotations

import math

import pytest
import torch

from litdeploy.trainer.objectives import CrossEntropy, Outputs


def test_scratch_is_cross_entropy() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    found = CrossEntropy().losses(Outputs(logits, labels))
    right = [math.exp(2) / (math.exp(2) + 1 + math.exp(-1)), 1 / (2 * math.exp(0.5) + 1)]
    assert found["loss"].item() == pytest.approx(-(math.log(right[0]) + math.log(right[1])) / 2, rel=1e-6)
