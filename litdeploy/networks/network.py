"""Network: a module and the spec that rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from litdeploy.batch import Batch, forward, mapped
from litdeploy.config.spec import InputTensor, NetworkSpec
from litdeploy.errors import NetworkError
from litdeploy.networks.output import answer_of, class_count_of


@dataclass(frozen=True)
class Network:
    """A module with its weights, and its spec.

    Attributes:
        module: takes the tensors that `spec.input` names: one as its first argument (normalized float32 images
            (N, C, H, W)), several as keyword arguments. Returns a tensor, or several in any structure (see
            `output.named_tensors`); a generator returns images (N, C, H, W), normalized as its input.
        spec: rebuilds the module without its weights.
        source: the network's file or name, for messages.
    """

    module: nn.Module
    spec: NetworkSpec
    source: str

    def example(self, batch_size: int = 2, half: bool = False) -> Batch:
        """Noise as input, on the module's device; the same each time.

        Args:
            half: give free sizes half of their maximum, so that what is recorded is valid for any size.
        """
        first = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        noise = {each.name: _noise(each, batch_size, generator, half) for each in self.spec.input.tensors}
        batch = noise if len(noise) > 1 else next(iter(noise.values()))
        return mapped(lambda tensor: tensor.to(first.device), batch)

    @torch.no_grad()
    def output(self, batch: Batch) -> Any:
        """What the module returns in eval mode."""
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        returned = forward(self.module, batch)
        for module in training:
            module.training = True
        return returned

    def within(self, text_length: int | None) -> Network:
        """The network for texts of at most this many tokens; a network of anything else is unchanged."""
        return replace(self, spec=self.spec.with_(input=self.spec.input.within(text_length)))

    def class_count(self) -> int:
        """Number of classes, from one run on one sample; 0 if its outputs are not of classes; for a generator, the
        number of its domains.

        Raises:
            NetworkError: a generator's images have another size than its input.
        """
        return self.classes_in(self.output(self.example(1)))

    def classes_in(self, output: object) -> int:
        """The same in what the module returned."""
        task, spec = self.spec.task_name, self.spec.input
        answer = answer_of(output, task)
        if not spec.domains:
            return class_count_of(answer, task)
        assert isinstance(answer, Tensor)
        given = answer.shape[1:]
        if given != spec.shape:
            raise NetworkError(
                f"{self.source}: takes images of {' × '.join(map(str, spec.shape))} and makes images of "
                f"{' × '.join(map(str, given))}. Choose a size that it keeps, for example a power of two: "
                f"--input-shape {spec.shape[0]},128,128"
            )
        return spec.domains


def _noise(tensor: InputTensor, batch_size: int, generator: torch.Generator, half: bool) -> Tensor:
    free = [size if isinstance(size, int) else max(1, (size.most or 64) // (2 if half else 1)) for size in tensor.shape]
    shape = (batch_size, *free)
    if tensor.mask:
        return _mask(*shape)
    if tensor.dtype == "float32":
        return torch.randn(shape, generator=generator)
    return torch.randint(tensor.below or 2, shape, generator=generator)


def _mask(n: int, length: int) -> Tensor:
    """Masks of texts of different lengths, padded at the end: the first is the longest, each has a token."""
    kept_N = length - torch.arange(n) * length // (2 * n)
    return (torch.arange(length) < kept_N[:, None]).long()


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out a module's tensors of images, and no others, in channels-last memory format, in place; return it."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return module


def counting() -> FlopCounterMode:
    """Count floating-point operations while open: matrix products, convolutions, attention; a multiply-add is two."""
    # torch (2.11 to 2.13) counts attention under its names on a GPU, not under that on a CPU.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations for arguments (N, heads, length, width)."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
