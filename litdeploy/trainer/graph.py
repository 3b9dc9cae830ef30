"""A step as a captured CUDA graph: launched whole, instead of kernel by kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# Real steps that run before the capture: libraries choose their algorithms, the optimiser makes its state.
_EAGER_STEPS = 3


class Captured:
    """A function of tensors, captured in a CUDA graph after a few calls and replayed from then on.

    Its tensors must have the same shapes in each call. One that is the very same object in each call (a dataset) is
    read where it is; the others are copied to where the graph reads them. What it returns the next call overwrites.

    A capture that fails (an operation that cannot be captured, memory) leaves the function uncaptured, and warns.

    Args:
        function: without synchronisation with the host. What it changes beside what it returns (weights, statistics) it
            changes in place.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self._function = function
        self._calls = 0
        self._failed = False
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._given: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call of the function. Its work is queued on the current stream."""
        self._calls += 1
        if self._failed:
            return self._function(*tensors)
        if self._calls <= _EAGER_STEPS:
            return self._beside(tensors)
        if self._graph is None and not self._capture(tensors):
            return self._function(*tensors)
        assert self._graph is not None
        for mine, given, tensor in zip(self._inputs, self._given, tensors, strict=True):
            if tensor is not given:
                mine.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _beside(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """A call on the stream that is captured from later, as capturing asks for."""
        device = tensors[0].device
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream(device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*tensors)
        here.wait_stream(self._stream)
        # Kept for the comparison by identity: what stays the same object is not copied.
        self._given = list(tensors)
        return outputs

    def _capture(self, tensors: tuple[Tensor, ...]) -> bool:
        self._inputs = [
            tensor if tensor is given else tensor.clone() for tensor, given in zip(tensors, self._given, strict=True)
        ]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._outputs = self._function(*self._inputs)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._failed = True
            self._inputs, self._given = [], []
            torch.cuda.synchronize()
            warnings.warn(
                f"the step could not be captured as a CUDA graph and runs kernel by kernel, slower: "
                f"{str(error).splitlines()[0]}",
                stacklevel=3,
            )
            return False
        self._graph = graph
        return True
