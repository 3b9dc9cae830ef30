"""InDistill's losses: one layer of its curriculum, and probabilistic knowledge transfer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.networks.width import Match
from litdeploy.trainer.objectives.objective import Objective, Outputs

_EPS = 1e-6


class Layer(Objective):
    """One layer of the curriculum: mse(S_i(x), the kept channels of T_i), over all elements.

    Nothing behind that section is trained meanwhile.
    """

    def __init__(self, match: Match) -> None:
        self.chain = (match.student,)
        self._match = match

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = outputs.chain[self.chain[0]]
        if self._match.channels is not None:
            teacher = teacher.index_select(self._match.dim, self._match.channels)
        return {"loss": F.mse_loss(student.float(), teacher.float())}


class ProbabilisticTransfer(Objective):
    """Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018; with both kernels as in the InDistill authors'
    code): the student's embeddings of a batch learn the similarities between the teacher's.

    L = w_pkt · Σ_kernel mean_ij (t_ij − s_ij) · (ln t_ij − ln s_ij) + w_labels · CE(S(x), y)

    where t and s are a kernel's values on teacher and student with rows that sum to 1; the kernels are
    (1 + cosine) / 2 and 1 / (1 + L2 distance). An embedding is the mean of the last section's output over its
    positions. Without labels, as published, the head is not trained.
    """

    def __init__(self, section: str, weight: float, label_weight: float) -> None:
        self.chain = (section,)
        self._weight = weight
        self._label_weight = label_weight
        self.needs_labels = label_weight > 0

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student_NE, teacher_NE = (embedding(output) for output in outputs.chain[self.chain[0]])
        with torch.autocast(student_NE.device.type, enabled=False):  # bf16 does not resolve similarities near 1
            pairs = [(_cosine(teacher_NE), _cosine(student_NE)), (_nearness(teacher_NE), _nearness(student_NE))]
            pkt = torch.stack([_divergence(teacher, student) for teacher, student in pairs]).sum()
        losses = {"loss": self._weight * pkt, "pkt": pkt}
        if self._label_weight:
            losses["labels"] = F.cross_entropy(outputs.logits, outputs.labels)
            losses["loss"] = losses["loss"] + self._label_weight * losses["labels"]
        return losses


def embedding(output: Tensor) -> Tensor:
    """A section's output (N, C, H, W), (N, tokens, C) or (N, C) → (N, C), float32: the mean over positions."""
    output = output.float()
    return output.mean((2, 3)) if output.dim() == 4 else output.mean(1) if output.dim() == 3 else output


def _cosine(x_NE: Tensor) -> Tensor:
    unit_NE: Tensor = x_NE / (x_NE.norm(dim=1, keepdim=True) + _EPS)
    return (unit_NE @ unit_NE.T + 1) / 2


def _nearness(x_NE: Tensor) -> Tensor:
    squares_N = x_NE.square().sum(1)
    squared_NN = (squares_N[:, None] + squares_N[None] - 2 * x_NE @ x_NE.T).clamp(min=0)
    return 1 / (1 + (squared_NN + _EPS).sqrt())


def _divergence(teacher_NN: Tensor, student_NN: Tensor) -> Tensor:
    """Jeffreys divergence of the kernels' rows; the logarithm of opposite embeddings' 0 is kept finite."""
    teacher_NN, student_NN = ((k / k.sum(1, keepdim=True)).clamp(min=_EPS) for k in (teacher_NN, student_NN))
    return ((teacher_NN - student_NN) * (teacher_NN.log() - student_NN.log())).mean()
