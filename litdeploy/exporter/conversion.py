"""A network in fp16 or bf16, with the head and the operations that overflow kept in fp32: measured on real images.

What a network computes is a sequence of calls to torch's functions, the same for every batch. A first run in fp32 notes
the largest magnitude that goes into and comes out of each call; the converted network makes the same calls, each with
its tensors cast to the type that was chosen for it. So a sum or an attention written in `forward` is guarded like a
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litdeploy.batch import Batch, forward
from litdeploy.config.target import Precision
from litdeploy.errors import NetworkError
from litdeploy.networks import Network, logits_of
from litdeploy.networks.folding import folded
from litdeploy.runtime.device import DTYPES

# Share of the type's largest number that a measured value may reach: other images than those measured go higher, and
# a sum may be larger on its way than at its end.
SAFE_SHARE = 0.25

# Not counted, and left as they are: a forward that compares types calls them or not, by the type of its weights.
_CONVERSIONS = frozenset(
    {
        Tensor.to,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.double,
        Tensor.type,
        Tensor.type_as,
    }
)

# ONNX has none of them in bfloat16.
_NOT_IN_BF16 = frozenset({torch.topk, Tensor.topk, torch.sort, Tensor.sort})


@dataclass(eq=False)
class Call:
    """One call of a torch function, over all images that were measured.

    Attributes:
        function: what was called.
        layer: name of the module that called it; empty for the network itself.
        largest: largest magnitude of what went in or came out; infinite where a value was.
        tensors: ids of the parameters and buffers among its arguments.
    """

    function: Any
    layer: str
    largest: float = 0.0
    tensors: set[int] = field(default_factory=set)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it can be computed in this type with room to spare."""
        if dtype is torch.bfloat16 and self.function in _NOT_IN_BF16:
            return False
        return self.largest <= SAFE_SHARE * torch.finfo(dtype).max


@dataclass(frozen=True)
class Conversion:
    """A converted network and what decided on it.

    Attributes:
        module: what the network takes, in any floating type → logits (N, classes), in the type of its last operation.
        precision: of all but what is kept.
        largest: largest magnitude of any value in it, on the images measured.
        largest_layer: the layer that has it.
        kept: layers with operations that stay in fp32, in their order; the last is the head.
    """

    module: nn.Module
    precision: Precision
    largest: float
    largest_layer: str
    kept: tuple[str, ...]


def convert(network: Network, precision: Precision, batches: Iterable[Batch]) -> Conversion:
    """Converts a copy of a network, its batch norms folded.

    The last layer with weights stays in fp32 and gives the logits: at 16, a step of bfloat16 is 1/8, in which classes
    that lie near to one another become one.

    Args:
        precision: `fp16` or `bf16`.
        batches: what the network takes (normalised images (N, C, H, W), float32), on its device.

    Raises:
        NetworkError: its forward does not call the same functions for each batch.
    """
    dtype = DTYPES[precision]
    module = folded(network)
    calls = measured(module, batches)
    head = max((index for index, call in enumerate(calls) if call.tensors), default=len(calls))
    wide = [call for index, call in enumerate(calls) if index >= head or not call.fits(dtype)]
    kept_tensors = {tensor for call in wide for tensor in call.tensors}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept_tensors:
            tensor.data = tensor.data.to(dtype)
    plan = [(call.function, torch.float32 if call in wide else dtype) for call in calls]
    return Conversion(
        _Converted(module, plan, network.source),
        precision=precision,
        largest=max((call.largest for call in calls), default=0.0),
        largest_layer=max(calls, key=lambda call: call.largest).layer if calls else "",
        kept=tuple(dict.fromkeys(call.layer for call in wide)),
    )


def measured(module: nn.Module, batches: Iterable[Batch]) -> list[Call]:
    """The calls that a module makes, with the largest magnitudes over all batches."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    calls: list[Call] = []
    with torch.no_grad(), _layers(module) as layer:
        for batch in batches:
            with _Measure(calls, layer, known):
                forward(module, batch)
    return calls


@contextmanager
def _layers(module: nn.Module) -> Iterator[Callable[[], str]]:
    """Gives a function that tells the innermost module that runs."""
    running: list[str] = [""]

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(enter(name)))
            handles.append(child.register_forward_hook(leave))
    try:
        yield lambda: running[-1]
    finally:
        for handle in handles:
            handle.remove()


class _Counted(TorchFunctionMode):
    """Numbers the calls that take floating tensors and give some: those that a type can be chosen for."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        uncounted = function in _CONVERSIONS or getattr(function, "__name__", "") == "__get__"
        if uncounted or next(_floating((args, kwargs)), None) is None:
            return function(*args, **kwargs)
        return self.call(function, args, kwargs)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Measure(_Counted):
    def __init__(self, calls: list[Call], layer: Callable[[], str], known: set[int]) -> None:
        super().__init__()
        self._calls, self._layer, self._known = calls, layer, known
        self._next = 0

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._next == len(self._calls):
            self._calls.append(Call(function, self._layer()))
        call = self._calls[self._next]
        self._next += 1
        given = list(_floating((args, kwargs)))
        # Before the call, which may write into one of them.
        magnitudes = [_magnitude(tensor) for tensor in given]
        result = function(*args, **kwargs)
        magnitudes += [_magnitude(tensor) for tensor in _floating(result)]
        call.largest = max(call.largest, *magnitudes)
        call.tensors |= {id(tensor) for tensor in given} & self._known
        return result


class _Cast(_Counted):
    def __init__(self, plan: list[tuple[Any, torch.dtype]], source: str) -> None:
        super().__init__()
        self._plan, self._source = plan, source
        self._next = 0

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._next == len(self._plan) or self._plan[self._next][0] != function:
            raise NetworkError(
                f"{self._source}: its forward does not make the same calls each time, so that it cannot be converted "
                "call by call. Export it in fp32: --precision fp32"
            )
        dtype = self._plan[self._next][1]
        self._next += 1
        return function(*_cast(args, dtype), **_cast(kwargs, dtype))


class _Converted(nn.Module):
    def __init__(self, module: nn.Module, plan: list[tuple[Any, torch.dtype]], source: str) -> None:
        super().__init__()
        self.module = module
        self._plan, self._source = plan, source

    def forward(self, *single: Tensor, **several: Tensor) -> Tensor:
        with _Cast(self._plan, self._source):
            return logits_of(self.module(*single, **several))


def _magnitude(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    largest = tensor.detach().abs().max().item()
    return largest if largest == largest else float("inf")


def _floating(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        yield from _floating(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _floating(value)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() and values.dtype != dtype else values
    if isinstance(values, dict):
        return {name: _cast(value, dtype) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_cast(value, dtype) for value in values)
    return values
