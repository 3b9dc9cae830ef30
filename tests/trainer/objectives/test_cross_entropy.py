from __future__ import annotations

import torch
import torch.nn.functional as F

from litdeploy.trainer.objectives import CrossEntropy, Outputs


def test_scratch_is_cross_entropy() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    found = CrossEntropy().losses(Outputs(logits, labels))
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, labels))
