"""The frozen teacher: one forward pass a batch gives its logits and what each section was given and gave."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import SectionCall, recording


class Teacher:
    """A frozen copy of a network, in eval mode, channels-last, without autograd state.

    Args:
        module: left as it is.
        sections: names of the sections whose inputs and outputs are asked for; none: the logits only.
        device: where the copy is put.
    """

    def __init__(self, module: nn.Module, sections: Sequence[str], device: torch.device) -> None:
        self.module = copy.deepcopy(module).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.eval().requires_grad_(False)
        self.sections = tuple(sections)

    @torch.no_grad()  # not inference_mode: the sections' inputs are saved for the student's backward pass
    def __call__(self, images_NCHW: Tensor) -> tuple[Tensor, dict[str, SectionCall]]:
        """Gives the logits (N, classes) in float32 and the sections' calls, in the type that autocast is set to."""
        with recording(self.module, self.sections) as calls:
            logits_NK = logits_of(self.module(images_NCHW)).float()
        return logits_NK, calls
