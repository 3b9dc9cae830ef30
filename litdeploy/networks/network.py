"""The noun that every stage passes on: a module, and what rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litdeploy.spec import NetworkSpec


@dataclass(frozen=True)
class Network:
    """A module with its weights, and its spec.

    Attributes:
        module: takes float32 images (N, C, H, W), normalised as `spec.input` says; gives logits (N, classes), or an
            output object with them under `.logits`.
        spec: rebuilds the module without its weights.
        source: what a message calls the network: the file that it came from, or its name.
    """

    module: nn.Module
    spec: NetworkSpec
    source: str

    def example(self, batch_size: int = 2) -> Tensor:
        """Normalised noise (batch_size, C, H, W) on the module's device; the same each time."""
        first = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch_size, *self.spec.input.shape, generator=generator).to(first.device)

    def class_count(self) -> int:
        """Width of the logits, by running the network once on one image."""
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            width = logits_of(self.module(self.example(1))).shape[-1]
        self.module.train(training)
        return int(width)


def logits_of(output: object) -> Tensor:
    """The logits (N, classes) in what a classifier returns: a tensor, a tuple that starts with one, or `.logits`."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"the network gives a {type(output).__name__}; a tensor of logits is needed")
