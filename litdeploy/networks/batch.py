"""A batch: what a network is run on. One tensor, or several by the names of its forward's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]


def forward(module: nn.Module, batch: Batch) -> Any:
    """What the module makes of a batch: one tensor is its first argument, several are keyword arguments."""
    return module(**batch) if isinstance(batch, dict) else module(batch)


def mapped(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with the function applied to each of its tensors."""
    if isinstance(batch, dict):
        return {name: function(tensor) for name, tensor in batch.items()}
    return function(batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Its tensors, in their order."""
    return list(batch.values()) if isinstance(batch, dict) else [batch]


def size_of(batch: Batch) -> int:
    """How many samples it holds."""
    return len(tensors_of(batch)[0])


def device_of(batch: Batch) -> torch.device:
    """Where it is."""
    return tensors_of(batch)[0].device


def moved(batch: Batch, device: torch.device) -> Batch:
    """The same on another device."""
    return mapped(lambda tensor: tensor.to(device), batch)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Its floating-point tensors in another type; what counts (token ids, masks) stays as it is."""
    return mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)


def picked(batch: Batch, rows: Tensor | slice) -> Batch:
    """The samples at these positions: a slice, or int64 on the batch's device."""
    if isinstance(rows, slice):
        return mapped(lambda tensor: tensor[rows], batch)
    return mapped(lambda tensor: tensor.index_select(0, rows), batch)


def in_parts(batch: Batch, size: int) -> list[Batch]:
    """Consecutive parts of `size` samples; the last may have fewer."""
    return [picked(batch, slice(start, start + size)) for start in range(0, size_of(batch), size)]
