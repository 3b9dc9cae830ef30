"""What an image is translated to: the domains of a batch's images, and those that they shall have.

Labels are int64: of exclusive domains one number an image (N), of attributes 0 or 1 for each (N, K).

Shape suffixes: N images, K domains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_vectors(labels: Tensor, domains: int) -> Tensor:
    """Labels as a generator takes them: float32 (N, K), 0 or 1."""
    return (F.one_hot(labels, domains) if labels.dim() == 1 else labels).float()


def swapped(labels: Tensor) -> Tensor:
    """Labels to train for: each image gets those of the one before it.

    In batches of a drawn order that is a drawn permutation of the labels, as the published code has it.
    """
    return labels.roll(1, 0)


def others(labels: Tensor, domains: int, first: int = 0) -> Tensor:
    """Labels to measure by, the same each time: of exclusive domains each image in turn gets another one than its own,
    of attributes those of the image before it.

    Args:
        first: place of the first of them in its split.
    """
    if labels.dim() == 2:
        return swapped(labels)
    turn_N = torch.arange(first, first + len(labels), device=labels.device) % max(1, domains - 1)
    return (labels + 1 + turn_N) % domains
