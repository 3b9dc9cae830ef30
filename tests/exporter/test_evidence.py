from __future__ import annotations

import torch

from litdeploy.exporter.evidence import Evidence


def test_a_rest_that_an_engine_does_not_take_is_left_out() -> None:
    evidence = Evidence(torch.zeros(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64))
    for least, most, left in ((1, 4, 10), (2, 4, 10), (3, 4, 8), (4, 4, 8), (4, 16, 10), (16, 16, 10)):
        taken = evidence.in_calls(least, most)
        assert (len(taken.inputs), len(taken.labels_N)) == (left, left)
