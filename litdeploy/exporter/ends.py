"""The ends of an exported file: what it takes and gives, round the network."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, cast, mapped
from litdeploy.config.spec import AnyInput, Free, InputSpec
from litdeploy.errors import SettingsError
from litdeploy.networks import logits_of

BATCH = "batch"


class Call(NamedTuple):
    """How an exporter calls `Ends`, and which sizes of that call are free."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any


class Ends(nn.Module):
    """A network that gives a tensor of logits, with its inputs and output in the types of an exported file.

    A single input is its first argument, several are keyword arguments of their names.

    Args:
        module: float32 images (or what else it takes) to logits, or an object that has them; a converted one casts its
            inputs itself.
        spec: what `module` takes.
        dtype: of inputs in floating point and of the logits.
        casts: whether `module` takes any floating type.
        embedded: whether the input is pixels instead: uint8 (N, H, W, C), normalised here.

    Raises:
        SettingsError: pixels are asked for, and the network takes no images.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        module: nn.Module,
        spec: AnyInput,
        dtype: torch.dtype = torch.float32,
        casts: bool = False,
        embedded: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.embedded, self.casts, self.dtype = embedded, casts, dtype
        self.inputs = spec.tensors
        if embedded:
            if not isinstance(spec, InputSpec):
                raise SettingsError("--embed-preprocessing: is for networks that take images. Leave it out.")
            for name, values in (("mean_C11", spec.mean), ("std_C11", spec.std)):
                self.register_buffer(name, 255 * torch.tensor(values).view(-1, 1, 1))
        if len(self.inputs) > 1:
            self._name_inputs()

    def _name_inputs(self) -> None:
        """Exporters take the names of a program's inputs from the signature."""

        def forward(**tensors: Tensor) -> Tensor:
            return Ends.forward(self, **tensors)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [inspect.Parameter(each.name, kind) for each in self.inputs]
        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        self.forward = forward  # type: ignore[assignment, method-assign]

    def forward(self, *single: Tensor, **several: Tensor) -> Tensor:
        if self.embedded:
            # Cast first: TensorRT does not transpose uint8.
            single = ((single[0].to(torch.float32).permute(0, 3, 1, 2) - self.mean_C11) / self.std_C11,)
        elif not self.casts:
            single, several = (
                tuple(_as_float32(tensor) for tensor in single),
                {name: _as_float32(tensor) for name, tensor in several.items()},
            )
        return logits_of(self.module(*single, **several)).to(self.dtype)

    def example(self, batch: Batch) -> Batch:
        """An input of the same number of samples as this batch for the network: noise, or black pixels."""
        if self.embedded and isinstance(batch, Tensor):
            return torch.zeros_like(batch.permute(0, 2, 3, 1), dtype=torch.uint8).contiguous()
        return mapped(lambda tensor: tensor.contiguous(), cast(batch, self.dtype))

    def call(self, batch: Batch) -> Call:
        """The call by which it is exported, for any number of samples.

        Args:
            batch: what the network takes.
        """
        free = {0: torch.export.Dim(BATCH)}
        known: dict[str, Any] = {}
        shapes: dict[str, dict[int, Any]] = {}
        for tensor in self.inputs:
            sizes = {
                place: known.setdefault(size.name, torch.export.Dim(size.name, max=size.most))
                for place, size in enumerate(tensor.shape, start=1)
                if isinstance(size, Free)
            }
            shapes[tensor.name] = free | sizes
        example = self.example(batch)
        if isinstance(example, dict):
            return Call((), example, shapes)
        # By its place: `forward` has no name for it.
        return Call((example,), {}, (tuple(shapes.values()),))


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
