from __future__ import annotations

import torch

from litdeploy.data import free_memory


def test_free_memory_is_of_this_machine() -> None:
    assert 2**24 < free_memory(torch.device("cpu")) < 2**50
