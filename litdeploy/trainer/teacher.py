"""The frozen teacher: one forward pass a batch gives its answer and each section's input T_{i−1} and output T_i."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, cast, forward, moved, picked
from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import AnyInput
from litdeploy.errors import NetworkError
from litdeploy.networks import Network, NetworkName, load, pooling_named, published
from litdeploy.networks.folding import fold_batch_norms
from litdeploy.networks.network import channels_last
from litdeploy.networks.output import answer_of
from litdeploy.networks.registry import is_code
from litdeploy.networks.sections import (
    BlockArguments,
    LastBlock,
    Section,
    SectionCall,
    passing_on,
    recording,
    results_of,
)
from litdeploy.runtime import compilation
from litdeploy.storage.checkpoint import load_weights, read_checkpoint
from litdeploy.storage.records import TeacherRecord

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Features:
    """The teacher's tensors for a batch.

    Attributes:
        output: its answer, float32.
        calls: section → its input and output, in the training precision.
    """

    output: Batch
    calls: dict[str, SectionCall]


class Teacher:
    """A frozen copy of a network: in eval mode, batch norms folded into the layers before them, channels-last, in the
    training precision, without autograd state.

    Args:
        module: not modified.
        sections: its sections whose inputs and outputs are needed; empty: the answer only.
        example: inputs, float32; the module is run on them once, to find what can be folded.
        device: of the copy.
        precision: `fp32` or `bf16`: dtype of its weights and of all results but the answer.
        compiled: run through `torch.compile`.
        fallback: called with the reason if compilation fails; the teacher then runs eagerly. None: raise an error.
        called: section → its name in the features, if that differs.
        task: that its answer is of.

    Attributes:
        module: the copy.
        template: its features of the first image of the example.
    """

    def __init__(
        self,
        module: nn.Module,
        sections: Sequence[Section],
        example: Batch,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
        fallback: Callable[[str], None] | None = None,
        called: Mapping[str, str] | None = None,
        task: str = "classification",
    ) -> None:
        self._settings = (sections, example, device, precision, compiled, fallback, called, task)
        self._task = task
        self._called = {section.name: section.name for section in sections} | dict(called or {})
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        fold_batch_norms(self.module, moved(example, next(module.parameters()).device), sections)
        self._dtype = DTYPES[precision]
        channels_last(self.module.to(device, self._dtype))
        self._hooks = ExitStack()  # open as long as this object lives: the copy is its own
        self._calls = self._hooks.enter_context(recording(self.module, sections))
        with results_of(self.module, sections) as self._results:
            self.template = self.eager(moved(picked(example, slice(1)), device))
        # Frozen weights are constants: Inductor lays them out once, and fuses what follows a convolution into it.
        self._run = compilation.compiled(self._forward, {"freezing": True}, fallback) if compiled else self._forward

    def of(self, module: nn.Module) -> Teacher:
        """A teacher with the same settings, of another module of the same shape."""
        return Teacher(module, *self._settings)

    # Not inference_mode: the sections' inputs are saved for the student's backward pass.
    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """Inputs in float32 or the training precision → features."""
        return self._run(cast(batch, self._dtype))

    @torch.no_grad()
    def eager(self, batch: Batch) -> Features:
        """The same, never compiled."""
        return self._forward(cast(batch, self._dtype))

    @torch.no_grad()
    def arguments(self, batch: Batch) -> dict[str, list[BlockArguments]]:
        """The further arguments of each section's blocks (masks, rotary embeddings) for a batch, named as its features.

        No block is run: each passes its input on, and the forward pass ends at the last one. With cached features this
        leaves little more than the embeddings of the teacher's pass.
        """
        with passing_on(self.module, self._settings[0], self._results) as found, suppress(LastBlock):
            forward(self.module, cast(batch, self._dtype))
        return {self._called[name]: arguments for name, arguments in found.items()}

    def recomputes(self, example: Batch) -> bool:
        """Whether the blocks take further tensors, and `arguments` gives them.

        It cannot if a block's arguments come from another block, as the position bias of a T5 does.
        """
        real = {name: call.arguments for name, call in self.eager(example).calls.items()}
        if not any(isinstance(each, Tensor) for each in _leaves(real)):
            return False
        try:
            found = self.arguments(example)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        ours, theirs = list(_leaves(found)), list(_leaves(real))
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))

    def _forward(self, batch: Batch) -> Features:
        output = cast(answer_of(forward(self.module, batch), self._task), torch.float32)
        return Features(output, {self._called[name]: call for name, call in self._calls.items()})


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def load_student(like: nn.Module, path: str | Path, name: str) -> nn.Module:
    """Load a trained student that teaches the next one.

    Args:
        like: a module of its shape; not modified.
        path: of its weights.
        name: of its network.

    Raises:
        CheckpointError: the file is no intact checkpoint, or of another network.
    """
    module = copy.deepcopy(like)
    load_weights(module, read_checkpoint(path).weights, str(path), name)
    return module.cpu().eval()


def read_teacher(
    teacher: str | Path | Network | nn.Module,
    recipe: Recipe,
    network: NetworkName | None,
    takes: Callable[[nn.Module], AnyInput] | None = None,
) -> tuple[Network, TeacherRecord | None]:
    """The teacher with its record; a network in memory has none yet. If the recipe cuts texts to fewer tokens, its
    input is shortened to them.

    Args:
        takes: finds the input of a module of which nothing else is known.

    Raises:
        NetworkError: the recipe, which may come from a stranger, names code, and the caller does not.
    """
    if isinstance(teacher, nn.Module):
        teacher = load(
            teacher, normalise=recipe.normalise, input_shape=recipe.input_shape, input=takes, task=recipe.task
        )
    if isinstance(teacher, Network):
        return teacher.within(recipe.data.text_length), None
    if network is None and recipe.network is not None and is_code(recipe.network):
        raise NetworkError(
            f"the recipe says network: {recipe.network!r}, which is code. It is run only when you name it: "
            f"--network {shlex.quote(recipe.network)}"
        )
    path, network = published(teacher, network if network is not None else recipe.network)
    network = pooling_named(network, recipe.pooling)
    checkpoint = read_checkpoint(path)
    loaded = load(
        checkpoint,
        network=network,
        normalise=recipe.normalise,
        input_shape=recipe.input_shape,
        input=takes,
        task=recipe.task,
    )
    loaded = loaded.within(recipe.data.text_length)
    return loaded, TeacherRecord(path=str(path.absolute()), sha256=checkpoint.sha256, spec=loaded.spec)
