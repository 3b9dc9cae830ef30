"""A network that a file describes is built within what such a file can need: its sizes may be made up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litdeploy.errors import NetworkError

# A student's file has the arguments of its teacher, which may be some times as large.
_TIMES_WEIGHTS, _ALWAYS_ALLOWED = 64, 2**30
# A ResNet-1202, the deepest that was published, is built by 17,000.
_MOST_CALLS = 60_000
_LONGEST_TENSOR = torch.iinfo(torch.int32).max
_BYTES = 8
_MAKERS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty", "new_zeros")
}


class BuildLimit(TorchDispatchMode):
    """While it is open, tensors are made only as far as weights of this size can need.

    Args:
        weights: that the network shall take.
        source: what a message calls them.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = sum(tensor.numel() for tensor in weights.values()) * _BYTES
        self._left, self._calls_left, self._source = _TIMES_WEIGHTS * held + _ALWAYS_ALLOWED, _MOST_CALLS, source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls_left -= 1
        if func.overloadpacket in _MAKERS:
            sizes = next((each for each in args if isinstance(each, list | tuple)), ())
            count = math.prod(sizes)
            self._left -= count * _BYTES
            if count > _LONGEST_TENSOR:
                self._left = -1
        if self._left < 0 or self._calls_left < 0:
            raise NetworkError(
                f"{self._source}: what it says of its network is far larger than its weights. It is damaged or made up."
            )
        return func(*args, **(kwargs or {}))
