"""A batch, the input or output of a network: one tensor, or several by the names of forward's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]


def forward(module: nn.Module, batch: Batch) -> Any:
    """Run a module on a batch: one tensor is its first argument, several are keyword arguments."""
    return module(**batch) if isinstance(batch, dict) else module(batch)


def mapped(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to each tensor of a batch."""
    if isinstance(batch, dict):
        return {name: function(tensor) for name, tensor in batch.items()}
    return function(batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Tensors of a batch, in order."""
    return list(batch.values()) if isinstance(batch, dict) else [batch]


def size_of(batch: Batch) -> int:
    """Number of samples."""
    return len(tensors_of(batch)[0])


def device_of(batch: Batch) -> torch.device:
    """Device of a batch."""
    return tensors_of(batch)[0].device


def moved(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device."""
    return mapped(lambda tensor: tensor.to(device), batch)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Convert floating-point tensors to a type; integers (token ids, masks) are unchanged."""
    return mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)


def picked(batch: Batch, rows: Tensor | slice) -> Batch:
    """Select samples: by a slice, or int64 positions on the batch's device."""
    if isinstance(rows, slice):
        return mapped(lambda tensor: tensor[rows], batch)
    return mapped(lambda tensor: tensor.index_select(0, rows), batch)


def joined(parts: Sequence[Batch]) -> Batch:
    """Join parts of the same tensors, one after another."""
    first = parts[0]
    if isinstance(first, dict):
        named = [part for part in parts if isinstance(part, dict)]
        return {name: torch.cat([part[name] for part in named]) for name in first}
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def in_parts(batch: Batch, size: int) -> list[Batch]:
    """Split into consecutive parts of `size` samples; the last may be smaller."""
    return [picked(batch, slice(start, start + size)) for start in range(0, size_of(batch), size)]
