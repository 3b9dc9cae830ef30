from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from litdeploy.networks.network import counting


def test_attention_counts_on_a_cpu_too() -> None:
    # Of 3 texts, 2 heads, 5 tokens that look at 7, 4 wide: two products of 5 × 7 × 4 each.
    query, key = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4)
    mask = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    for given in (None, mask):
        with counting() as found, torch.no_grad():
            scaled_dot_product_attention(query, key, key, attn_mask=given)
        assert found.get_total_flops() == 3 * 2 * 2 * (2 * 5 * 7 * 4)
    with counting() as found:
        linear(torch.randn(6, 4), torch.randn(8, 4))
    assert found.get_total_flops() == 2 * 6 * 4 * 8
