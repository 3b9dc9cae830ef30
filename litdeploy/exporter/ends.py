"""The ends of an exported file: what it takes and gives, round the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litdeploy.networks import logits_of
from litdeploy.spec import InputSpec


class Ends(nn.Module):
    """A network that gives a tensor of logits, with its input and output in the types of an exported file.

    Args:
        module: float32 images to logits, or an object that has them; a converted one casts its input itself.
        spec: what `module` takes.
        dtype: of the input and the logits.
        casts: whether `module` takes any floating type.
        embedded: whether the input is pixels instead: uint8 (N, H, W, C), normalised here.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        dtype: torch.dtype = torch.float32,
        casts: bool = False,
        embedded: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.embedded, self.casts, self.dtype = embedded, casts, dtype
        if embedded:
            for name, values in (("mean_C11", spec.mean), ("std_C11", spec.std)):
                self.register_buffer(name, 255 * torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.embedded:
            # Cast first: TensorRT does nothing else with uint8.
            images = (images.to(torch.float32).permute(0, 3, 1, 2) - self.mean_C11) / self.std_C11
        elif not self.casts:
            images = images.to(torch.float32)
        return logits_of(self.module(images)).to(self.dtype)

    def example(self, batch_NCHW: Tensor) -> Tensor:
        """An input of the same number of images as this batch for the network: noise, or black pixels."""
        if self.embedded:
            return torch.zeros_like(batch_NCHW.permute(0, 2, 3, 1), dtype=torch.uint8).contiguous()
        return batch_NCHW.to(self.dtype)
