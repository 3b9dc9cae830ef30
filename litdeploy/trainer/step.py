"""One step: the teacher once, the student's sections on the teacher's inputs, the student's own chain.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    branches = {
        name: (
            run_section(list(container(student, name)), calls[name].input, calls[name].arguments),
            calls[name].output,
        )
        for name in ordered
        if name not in in_chain
    }
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
