"""The contract of an objective: what a training step must compute for it, and the losses it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from litdeploy.batch import Batch


@dataclass(frozen=True)
class Outputs:
    """The tensors computed by one step.

    Attributes:
        output: answer of the student's own chain, float32: logits (N, classes), images (N, C, H, W), or what else its
            task has. Empty if the objective needs no chain.
        labels: int64, (N,); attributes: (N, K); −1 without labels.
        teacher_output: the teacher's answer, float32; None if the objective needs no teacher.
        branches: section → (S_i(T_{i−1}), T_i): the student's section on the teacher's input, and the teacher's output.
        chain: section → (its output in the student's own chain, the teacher's output).
        inputs: the student's inputs.
        again: runs the student's own chain on other inputs.
    """

    output: Batch
    labels: Tensor
    teacher_output: Batch | None = None
    branches: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chain: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: Batch | None = None
    again: Callable[[Batch], Batch] | None = None

    @property
    def logits(self) -> Tensor:
        """The output of a task that has one tensor."""
        assert isinstance(self.output, Tensor)
        return self.output


class Objective(ABC):
    """A loss, and what a step must compute for it. The values here are the defaults.

    Attributes:
        needs_teacher: whether the teacher runs at all.
        needs_chain: whether the student's own chain runs.
        freezes: whether all but the planned sections keeps its weights, in eval mode.
        branches: sections that run on the teacher's input.
        chain: sections whose output in the student's own chain is compared.
        scored: whether the task's metric on the validation split says how good its student is.
        learns_by: the output that carries the loss: see `Task.check_objective`.
        needs_labels: whether the loss has no meaning without labels.
    """

    needs_teacher: bool = True
    needs_chain: bool = True
    freezes: bool = False
    branches: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    scored: bool = True
    learns_by: Literal["logits", "images", "output", "sections"] = "logits"
    needs_labels: bool = False

    @abstractmethod
    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scalar losses by name, float32; `loss` is minimized, the others are its parts."""
