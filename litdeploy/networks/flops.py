"""Floating-point operations, as torch counts them: matrix products, convolutions, attention; a multiply-add is two."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def counting() -> FlopCounterMode:
    """Counts what runs while it is open. Elementwise work is left out."""
    # torch (2.11 to 2.13) knows attention by the names that it has on a GPU, and not by that of a CPU.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (N, heads, length, width)."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
