from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from litdeploy.trainer.objectives import Hint, Outputs


def test_a_hint_compares_one_section_through_a_regressor_where_widths_differ() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    regressor = nn.Conv2d(3, 5, 1)
    hint = Hint(("layer1", "layer2", "layer3"), regressor)
    assert hint.chain == ("layer2",)
    found = hint.losses(
        Outputs(torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 3), chain={"layer2": (student, teacher)})
    )
    torch.testing.assert_close(found["loss"], 0.5 * F.mse_loss(regressor(student), teacher))
    assert list(hint.parameters()) == list(regressor.parameters())
