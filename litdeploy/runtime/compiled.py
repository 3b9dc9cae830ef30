"""The runner `compiled`: PyTorch through torch.compile (Inductor)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from litdeploy.batch import Batch, cast, forward, mapped, tensors_of
from litdeploy.errors import CompilationError, RunnerError
from litdeploy.networks import answer_of
from litdeploy.runtime.compilation import compiled
from litdeploy.runtime.device import DTYPES, device_name, ieee_float32
from litdeploy.runtime.eager import PRECISIONS, placed
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open


class CompiledRunner:
    """Compiles the module separately for each batch shape, at the first call with that shape."""

    name = "compiled"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._network = source.needed_network(self.name)
        self._precision = check_precision(self.name, precision, PRECISIONS)
        self._mode = source.compile_mode
        # The other modes capture CUDA graphs, whose outputs the next call overwrites.
        self._copies = device.type == "cuda" and self._mode != "default"
        self._module: nn.Module | None = None
        self._compiled: dict[tuple[torch.Size, ...], Callable[[Batch], Batch]] = {}
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        started = time.perf_counter()
        self._module = placed(self._network, self.device, self._precision)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        self._module = None
        self._compiled.clear()

    def run(self, batch: Batch) -> Batch:
        """See `Runner.run`. The first call with a batch shape compiles."""
        if self._module is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._network.spec.input.tensors, self.device)
        # Dynamo also guards on strides and requires_grad: without this the same shape would compile again.
        batch = cast(mapped(lambda tensor: tensor.detach().contiguous(), batch), DTYPES[self._precision])
        call = self._compiled.get(_shapes(batch))
        with torch.inference_mode(), ieee_float32(self.device):
            output = cast(self._first(self._module, batch) if call is None else call(batch), torch.float32)
            return mapped(torch.clone, output) if self._copies else output

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._precision,
            mode=f"inductor, {self._mode}, channels last",
            versions={"torch": str(torch.__version__)},
            build_seconds=self._build_seconds,
        )

    def _first(self, module: nn.Module, batch: Batch) -> Batch:
        task = self._network.spec.task_name

        def run(batch: Batch) -> Batch:
            return answer_of(forward(module, batch), task)

        call = compiled(run, mode=self._mode)
        try:
            output = call(batch)
        except CompilationError as error:
            raise RunnerError(
                f"the runner '{self.name}' cannot compile {self._network.source} ({error}). "
                "torch.compile needs a C++ compiler (apt-get install g++) and, on CUDA, Triton (pip install triton). "
                "Or leave this runner out of the target's `runners`."
            ) from error
        self._compiled[_shapes(batch)] = call
        return output


def _shapes(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in tensors_of(batch))
