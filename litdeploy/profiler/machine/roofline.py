"""The roofline: the shortest time that a piece of work can take on this device, from its arithmetic and memory traffic.

It counts convolutions and matrix products, forward and backward; each reads its inputs and writes its outputs once.
Everything else (batch norm, ReLU, losses, the optimizer step) counts as free, since it could be fused into them. So no
program runs faster than the roof (Williams, Waterman and Patterson, Roofline, Communications of the ACM 2009).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litdeploy.networks.network import counting

# With few threads, a product of 1,024 rows reaches the rate of one of 2,048, which takes eight times as long.
_FEW_THREADS = 4

_COUNTED = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass(frozen=True)
class Work:
    """The work of one function call.

    Attributes:
        operations: floating-point operations; a multiply-add counts as two.
        bytes: bytes read and written.
    """

    operations: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        operations: floating-point operations per second of a matrix product.
        bytes: bytes per second, read and written, of a large copy.
    """

    operations: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    """The shortest time for a piece of work at given rates.

    Attributes:
        seconds: the larger of the two below.
        by_operations, by_bytes: seconds for the arithmetic and for the memory traffic.
    """

    seconds: float
    by_operations: float
    by_bytes: float


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            tensors = [leaf for leaf in tree_leaves((args, outputs)) if isinstance(leaf, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return outputs


def count_work(function: Callable[[], Any]) -> Work:
    """Run the function once, eagerly, and count its work. Not in inference mode, where operators have other names."""
    assert not torch.is_inference_mode_enabled()
    with counting() as operations, _Bytes() as moved:
        function()
    return Work(float(operations.get_total_flops()), float(moved.total))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device with torch's present number of threads, best of several; measured once per process."""
    return _measure_rates(device, dtype, torch.get_num_threads())


@cache
def _measure_rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    on_cuda = device.type == "cuda"
    on_processor = (512, 1024) if threads <= _FEW_THREADS else (2048,)
    sides, length = ((8192,), 2**28) if on_cuda else (on_processor, 2**26)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return Rates(max(_product_rate(side, device, dtype) for side in sides), 2 * length / copy)


def _product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second. Large products occupy all threads; small ones end before another process preempts them."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: a @ b, device)


def roof(work: Work, rates: Rates) -> Roof:
    """The roof of a piece of work."""
    by_operations, by_bytes = work.operations / rates.operations, work.bytes / rates.bytes
    return Roof(max(by_operations, by_bytes), by_operations, by_bytes)


def _fastest(function: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    # A copy or a product cannot run faster than the hardware allows, so the fastest is the least disturbed.
    return statistics.fmean(sorted(seconds)[:3])
