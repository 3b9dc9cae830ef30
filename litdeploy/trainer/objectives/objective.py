"""What an objective is: what it needs of a step, what the step gives it, and in which phases a method trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from litdeploy.recipe import Phase

# How a method's student starts: blocks copied, blocks new, or everything new (stem and head too).
Init = Literal["copy", "fresh", "scratch"]


@dataclass(frozen=True)
class Outputs:
    """What one step computed.

    Attributes:
        logits: of the student's own chain, (N, classes), float32; empty where the objective needs no chain.
        labels: (N,), int64.
        teacher_logits: (N, classes), float32; None where the objective needs no teacher.
        branches: section → (S_i(T_{i−1}), T_i): the student's section on the teacher's input, the teacher's output.
        chain: section → (the student's output in its own chain, the teacher's).
    """

    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    branches: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chain: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """What a step must compute, and the loss of it.

    Attributes:
        needs_teacher: whether the teacher runs at all.
        needs_chain: whether the student's own chain runs.
        freezes: whether all but the planned sections stays as it is, in eval mode.
        branches: sections that run on the teacher's input.
        chain: sections whose output in the student's own chain is compared.
    """

    needs_teacher: bool
    needs_chain: bool
    freezes: bool
    branches: tuple[str, ...]
    chain: tuple[str, ...]

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scalars by name in float32; `loss` is the one that is minimised, the others are its parts."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the objective's own that are trained beside the student's."""


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of the recipe with the objective that it trains by."""

    name: str
    settings: Phase
    objective: Objective
