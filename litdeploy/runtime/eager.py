"""The runner `eager`: PyTorch, one operator at a time."""

from __future__ import annotations

import copy
import time
from typing import Self

import torch
from torch import nn

from litdeploy.batch import Batch, cast, forward
from litdeploy.networks import Network, answer_of
from litdeploy.networks.network import channels_last
from litdeploy.runtime.device import DTYPES, device_name, ieee_float32
from litdeploy.runtime.runner import Description, Source, check_batch, check_precision, not_open

# The precisions of the runners that run PyTorch modules.
PRECISIONS = ("fp32", "bf16")


class EagerRunner:
    """Runs the module in eval mode, in channels-last memory format."""

    name = "eager"

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self.device = device
        self._network = source.needed_network(self.name)
        self._precision = check_precision(self.name, precision, PRECISIONS)
        self._module: nn.Module | None = None
        self._build_seconds = 0.0

    def __enter__(self) -> Self:
        started = time.perf_counter()
        self._module = placed(self._network, self.device, self._precision)
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        self._module = None

    def run(self, batch: Batch) -> Batch:
        """See `Runner.run`."""
        if self._module is None:
            raise not_open(self.name)
        check_batch(self.name, batch, self._network.spec.input.tensors, self.device)
        with torch.inference_mode(), ieee_float32(self.device):
            output = forward(self._module, cast(batch, DTYPES[self._precision]))
            return cast(answer_of(output, self._network.spec.task_name), torch.float32)

    def describe(self) -> Description:
        """See `Runner.describe`."""
        return Description(
            runner=self.name,
            device=device_name(self.device),
            precision=self._precision,
            mode="channels last",
            versions={"torch": str(torch.__version__)},
            build_seconds=self._build_seconds,
        )


def placed(network: Network, device: torch.device, precision: str) -> nn.Module:
    """Copy a network's module to a device, ready for inference.

    Always a copy: the device, dtype, memory format and eval mode would each alter the caller's module.
    """
    module = copy.deepcopy(network.module).eval().requires_grad_(False)
    return channels_last(module.to(device=device, dtype=DTYPES[precision]))
