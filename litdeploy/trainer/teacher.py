"""The frozen teacher: one forward pass a batch gives its logits and what each section was given and gave."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, cast, forward, moved, picked
from litdeploy.networks.folding import fold_batch_norms
from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import SectionCall, recording
from litdeploy.runtime import compilation
from litdeploy.storage.checkpoint import load_weights, read_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Features:
    """What the teacher makes of a batch.

    Attributes:
        logits_NK: float32.
        calls: section → what it was given and what it gave, in the training precision.
    """

    logits_NK: Tensor
    calls: dict[str, SectionCall]


class Teacher:
    """A frozen copy of a network: in eval mode, batch norms folded into what is before them, channels-last, in the
    training precision, without autograd state.

    Args:
        module: left as it is.
        sections: names of the sections whose inputs and outputs are asked for; none: the logits only.
        example: what the module takes, float32; it is run on it once, to see what can be folded.
        device: where the copy is put.
        precision: `fp32` or `bf16`: the type of its weights and of all that it computes but the logits.
        compiled: through `torch.compile`.
        fallback: told why it cannot be compiled, and that it therefore is not; None: that is an error.
        called: section → what the features call it, where that is not its name.

    Attributes:
        module: the copy.
        template: what it makes of the first image of the example.
    """

    def __init__(
        self,
        module: nn.Module,
        sections: Sequence[str],
        example: Batch,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
        fallback: Callable[[str], None] | None = None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = (sections, example, device, precision, compiled, fallback, called)
        self._called = {name: name for name in sections} | dict(called or {})
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        fold_batch_norms(self.module, moved(example, next(module.parameters()).device), sections)
        self._dtype = DTYPES[precision]
        self.module.to(device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._hooks = ExitStack()  # open as long as this object lives: the copy is its own
        self._calls = self._hooks.enter_context(recording(self.module, sections))
        self.template = self.eager(moved(picked(example, slice(1)), device))
        # Frozen weights are constants: Inductor lays them out once, and fuses what follows a convolution into it.
        self._run = compilation.compiled(self._forward, {"freezing": True}, fallback) if compiled else self._forward

    def of(self, module: nn.Module) -> Teacher:
        """A teacher like this one, of another module of the same shape."""
        return Teacher(module, *self._settings)

    # Not inference_mode: the sections' inputs are saved for the student's backward pass.
    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """What the module takes, in float32 or the training precision → what the teacher makes of it."""
        return self._run(cast(batch, self._dtype))

    @torch.no_grad()
    def eager(self, batch: Batch) -> Features:
        """The same, never compiled."""
        return self._forward(cast(batch, self._dtype))

    def _forward(self, batch: Batch) -> Features:
        logits_NK = logits_of(forward(self.module, batch)).float()
        return Features(logits_NK, {self._called[name]: call for name, call in self._calls.items()})


def successor(like: nn.Module, path: str | Path, name: str) -> nn.Module:
    """A student that was trained and written, as the one that teaches next.

    Args:
        like: a module of its shape; left as it is.
        path: of its weights.
        name: of its network.

    Raises:
        CheckpointError: the file is no whole checkpoint, or of another network.
    """
    module = copy.deepcopy(like)
    load_weights(module, read_checkpoint(path).weights, str(path), name)
    return module.cpu().eval()
