"""One step: the teacher once, the student's sections on the teacher's inputs, the student's own chain.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import SectionCall, container, recording, run_section
from litdeploy.trainer.objectives import Objective, Outputs
from litdeploy.trainer.teacher import Teacher


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


@contextmanager
def statistics_kept(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While it is open, batch norms normalise by their batch as ever, and leave their running statistics alone.

    What is deployed is the student's own chain: statistics of the teacher's inputs mixed into its own cost accuracy.
    """
    norms = [module for block in blocks for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def forward(
    student: nn.Module, teacher: Teacher | None, objective: Objective, images_NCHW: Tensor, labels_N: Tensor
) -> Outputs:
    """Computes what the objective compares.

    Args:
        student: prepared for the objective.
        teacher: None where the objective needs none.
        images_NCHW: normalised.
        labels_N: int64.
    """
    teacher_logits_NK: Tensor | None = None
    calls: dict[str, SectionCall] = {}
    if objective.needs_teacher:
        assert teacher is not None
        teacher_logits_NK, calls = teacher(images_NCHW)
    # Behind a frozen stem the student's own first section runs on the teacher's input already: run it once.
    ordered = [name for name in calls if name in objective.branches]
    in_chain = ordered[:1] if objective.freezes else []
    branches = {}
    for name in ordered:
        if name not in in_chain:
            blocks = list(container(student, name))
            with statistics_kept(blocks):
                branches[name] = (run_section(blocks, calls[name].input, calls[name].arguments), calls[name].output)
    with recording(student, [*in_chain, *objective.chain]) as own:
        logits_NK = logits_of(student(images_NCHW)).float()
    branches |= {name: (own[name].output, calls[name].output) for name in in_chain}
    chain = {name: (own[name].output, calls[name].output) for name in objective.chain}
    return Outputs(logits_NK, labels_N, teacher_logits_NK, {name: branches[name] for name in ordered}, chain)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def train_step(
    student: nn.Module,
    teacher: Teacher | None,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    images_NCHW: Tensor,
    labels_N: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    """Forward, backward and one update. Gives the losses by name, detached, on the device."""
    with autocast(images_NCHW.device, precision):
        outputs = forward(student, teacher, objective, images_NCHW, labels_N)
        losses = objective.losses(outputs)
    optimiser.zero_grad(set_to_none=True)
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return {name: loss.detach() for name, loss in losses.items()}
