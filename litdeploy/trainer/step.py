"""One step: the student's sections on the teacher's inputs, the student's own chain, the update.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.batch import Batch, device_of, forward, tensors_of
from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import container, recording, run_section
from litdeploy.runtime import compilation
from litdeploy.trainer.objectives import Objective, Outputs
from litdeploy.trainer.parallel import ALONE, Ranks
from litdeploy.trainer.streams import side_by_side
from litdeploy.trainer.teacher import Features


def prepare(student: nn.Module, objective: Objective, sections: Sequence[str]) -> None:
    """Puts the student in the state that the objective trains it in.

    Where the objective freezes, all but `sections` keeps its weights and, in eval mode, its batch norm statistics: the
    stem then computes exactly what the teacher's computes.
    """
    student.train().requires_grad_(True)
    if objective.freezes:
        student.eval().requires_grad_(False)
        for name in sections:
            container(student, name).train().requires_grad_(True)


def without_statistics(blocks: nn.Sequential | nn.ModuleList) -> nn.Sequential | nn.ModuleList:
    """A twin with the very same parameters, whose batch norms normalise by their batch and keep no running statistics.

    What is deployed is the student's own chain: statistics of the teacher's inputs mixed into its own cost accuracy.
    """
    shared = {id(parameter): parameter for parameter in blocks.parameters()}
    twin = copy.deepcopy(blocks, shared)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return twin


@contextmanager
def _plain_group_norms(module: nn.Module) -> Iterator[None]:
    """While it is open, no group norm takes a channels-last tensor without a gradient: on a CPU its backward pass then
    reads a gradient that is not there, and the process dies (torch 2.11 to 2.13). What a section gets from the teacher
    is such a tensor."""

    def contiguous(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return args if x.requires_grad or x.device.type != "cpu" else (x.contiguous(), *args[1:])

    norms = [norm for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(contiguous) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_chain(objective: Objective, sections: Sequence[str]) -> tuple[str, ...]:
    """The branch that the student's own chain computes: behind a frozen stem its first section runs on the teacher's
    input already."""
    shared = objective.freezes and objective.needs_chain
    return tuple(name for name in sections[:1] if shared and name in objective.branches)


def inputs_needed(objective: Objective, sections: Sequence[str]) -> set[str]:
    """Sections whose teacher's input the objective's step takes."""
    return set(objective.branches) - set(in_chain(objective, sections))


def outputs_needed(objective: Objective) -> set[str]:
    """Sections whose teacher's output the objective compares."""
    return {*objective.branches, *objective.chain}


class Step:
    """The steps of one phase: forward, backward and one update each.

    A context manager: while it is open the student carries hooks.

    Args:
        student: trained in place; put in the state that the objective trains it in.
        objective: what is learnt by.
        sections: names of the student's planned sections, in the order they run in.
        precision: `fp32`, or `bf16` by autocast.
        compiled: forward and backward through `torch.compile`.
        fallback: told why it cannot be compiled, and that it therefore is not; None: that is an error.
        ranks: that share each batch; gradients are averaged over them.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        sections: Sequence[str],
        precision: str = "fp32",
        compiled: bool = False,
        fallback: Callable[[str], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.student = student
        self.objective = objective
        self._sections = sections
        self._ranks = ranks
        self.prepare()
        self.precision = precision
        self._in_chain = in_chain(objective, sections)  # run once, not twice
        self._branches = {
            name: without_statistics(container(student, name))
            for name in sections
            if name in inputs_needed(objective, sections)
        }
        self._hooks = ExitStack()
        self._own = self._hooks.enter_context(recording(student, [*self._in_chain, *objective.chain]))
        for module in (student, *self._branches.values()):
            self._hooks.enter_context(_plain_group_norms(module))
        # What is compiled has an order of its own.
        device = next(student.parameters()).device
        side = len(self._branches) if device.type == "cuda" and not compiled else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(side)]  # type: ignore[no-untyped-call]
        self._compute = compilation.compiled(self.losses, fallback=fallback) if compiled else self.losses

    def prepare(self) -> None:
        """Puts the student in the state that it is trained in; after an evaluation, say."""
        prepare(self.student, self.objective, self._sections)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def __call__(
        self,
        optimiser: torch.optim.Optimizer,
        inputs: Batch,
        labels_N: Tensor,
        features: Features | None,
    ) -> dict[str, Tensor]:
        """One update. Gives the losses by name, detached, on the device: those of this rank's part of the batch."""
        losses = self._compute(inputs, labels_N, features)
        optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self._ranks.average(parameter.grad for parameter in trained if parameter.grad is not None)
        optimiser.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, inputs: Batch, labels_N: Tensor, features: Features | None) -> dict[str, Tensor]:
        """The objective's losses of a batch.

        Args:
            inputs: what the student takes: normalised images, float32 or what autocast would make of it; the character
                ids (N, L) of texts; or images with the domains that they shall have.
            labels_N: int64.
            features: the teacher's, of these inputs; None where the objective needs none.
        """
        with torch.autocast(device_of(inputs).type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective.losses(self.outputs(inputs, labels_N, features))

    def outputs(self, inputs: Batch, labels_N: Tensor, features: Features | None) -> Outputs:
        """What the objective compares. See `losses`."""
        calls = {} if features is None else features.calls
        branches = [
            partial(run_section, list(twin), calls[name].input, calls[name].arguments)
            for name, twin in self._branches.items()
        ]
        logits, outputs = side_by_side(partial(self._chain, inputs), branches, self._streams)
        own = self._own
        ran = dict(zip(self._branches, outputs, strict=True))
        ran |= {name: own[name].output for name in self._in_chain}
        return Outputs(
            logits.float(),
            labels_N,
            None if features is None else features.logits_NK,
            {name: (ran[name], calls[name].output) for name in self.objective.branches},
            {name: (own[name].output, calls[name].output) for name in self.objective.chain},
            inputs,
            self._chain,
        )

    def _chain(self, inputs: Batch) -> Tensor:
        """The student's own logits; nothing where the objective needs none."""
        if not self.objective.needs_chain:
            return tensors_of(inputs)[0].new_empty(0)
        return logits_of(forward(self.student, inputs))
