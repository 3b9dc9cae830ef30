"""Embedding: a vector a sample (N, D), or one a token (N, L, D), which is averaged; compared with the teacher's.

Shape suffixes: N samples, L tokens, D dimensions, M samples that are compared in pairs, Q of a block of them, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch, size_of
from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import BatchParity, Measures
from litdeploy.tasks.task import (
    Batches,
    Inference,
    Measure,
    Task,
    check_shapes,
    counted,
    finite,
    largest_differences,
    needed,
)

# Samples among which neighbors and pairs are looked for: the first of a split. Similarities of a block of them take
# 8 MB.
_COMPARED, _BLOCK = 4_096, 512
_NEIGHBORS = 10
_PAIRS = 20_000


class EmbeddingTask(Task[Measures]):
    """Vectors whose directions carry the meaning: the cosine to the teacher's, and whether neighbors stay neighbors."""

    name = "embedding"
    score = Measures
    output = "embeddings"
    output_name = "embeddings"  # torch's exporter calls the lookup of a token `embedding`
    makes = "makes embeddings"
    needs_reference = True
    embeds = True
    advice = "Choose another method: --method lit"
    measure = "likeness"
    heading = "Size and likeness"
    note = (
        "Embeddings are compared with the teacher’s of the same samples: their mean cosine; the share of each sample’s "
        "ten nearest samples that are the teacher’s too; and Spearman’s correlation of the similarities of pairs."
    )
    side_by_side = "Likeness of each student’s embeddings to its teacher’s"
    measures = (
        Measure("cosine", "Mean cosine to the teacher"),
        Measure("neighbors", "Overlap of the 10 nearest neighbors", decimals=3),
        Measure("spearman", "Rank correlation of pair similarities"),
    )

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return 0 if len(sizes) in (1, 2) else None

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return ("dimensions",)

    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        """Accept any: labels are for retrieval alone."""

    def vectors(self, answer: Batch, inputs: Batch | None) -> Tensor:
        """(N, D): (N, L, D) is averaged over the tokens that count."""
        assert isinstance(answer, Tensor)
        if answer.dim() == 2:
            return answer
        there_NL1 = counted(answer, inputs)[:, :, None]
        return (answer * there_NL1).sum(1) / there_NL1.sum(1).clamp(min=1)

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """1 − cosine, mean over the batch; labels and temperature have no part in it."""
        student_ND, teacher_ND = (self.vectors(each, inputs) for each in (student, teacher))
        return (1 - F.cosine_similarity(student_ND, teacher_ND.detach(), dim=1)).mean()

    def evaluate(
        self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None
    ) -> Measures:
        """`cosine` over all samples; `neighbors` and `spearman` over the first few thousand. See `Task.evaluate`."""
        original = needed(reference)
        total: Tensor | None = None
        samples = 0
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for batch, _ in batches:
                pair = self.vectors(run(batch), batch).float(), self.vectors(original(batch), batch).float()
                check_shapes(*pair)
                cosine = F.cosine_similarity(*pair, dim=1).double().nan_to_num(nan=-1.0).sum()
                total = cosine if total is None else total + cosine
                if samples < _COMPARED:
                    kept.append(pair)
                samples += size_of(batch)
        if total is None:
            raise DataError("there is nothing to compare: the split is empty. Give --data a dataset with this split.")
        found_MD, expected_MD = (torch.cat(each)[:_COMPARED] for each in zip(*kept, strict=True))
        values = {"cosine": total.item() / samples}
        if len(found_MD) > _NEIGHBORS + 1:
            values["neighbors"] = neighbor_overlap(expected_MD, found_MD)
            values["spearman"] = pair_correlation(expected_MD, found_MD)
        return Measures(task="embedding", values=finite(values), images=samples)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """|candidate − reference| ≤ atol + rtol · max |reference|, and the cosine of each pair at least the limit."""
        assert isinstance(expected, Tensor)
        assert isinstance(found, Tensor)
        expected_ND, found_ND = expected.double().cpu(), found.double().cpu()
        absolute, relative = largest_differences(expected_ND, found_ND)
        cosines = F.cosine_similarity(expected_ND, found_ND, dim=-1)
        least, mean = cosines.min().item(), cosines.mean().item()
        near = absolute is not None and absolute <= tolerance.atol + tolerance.rtol * expected_ND.abs().max().item()
        return BatchParity(
            batch_size=batch_size,
            images=len(expected_ND),
            max_absolute=absolute,
            max_relative=relative,
            top1=None,
            cosines=None if absolute is None else (least, mean),
            within=near and least >= tolerance.cosine,
        )


def neighbor_overlap(expected_MD: Tensor, found_MD: Tensor, count: int = _NEIGHBORS) -> float:
    """Mean share of each sample's nearest samples, by cosine and without itself, that are among both sides' nearest."""
    count = min(count, len(expected_MD) - 1)
    units = [F.normalize(each, dim=1) for each in (expected_MD, found_MD)]
    shared = 0
    for start in range(0, len(expected_MD), _BLOCK):
        nearest = []
        for unit_MD in units:
            near_QM = unit_MD[start : start + _BLOCK] @ unit_MD.T
            near_QM.diagonal(start).fill_(-2)
            nearest.append(near_QM.topk(count, dim=1).indices)
        shared += int((nearest[0][:, :, None] == nearest[1][:, None, :]).sum())
    return shared / (count * len(expected_MD))


def pair_correlation(expected_MD: Tensor, found_MD: Tensor, pairs: int = _PAIRS) -> float:
    """Spearman's correlation between both sides' cosines of drawn pairs of samples, the same pairs each time."""
    count = len(expected_MD)
    generator = torch.Generator().manual_seed(0)
    first_P = torch.randint(count, (pairs,), generator=generator)
    second_P = (first_P + torch.randint(1, count, (pairs,), generator=generator)) % count
    sides = []
    for vectors_MD in (expected_MD, found_MD):
        unit_MD = F.normalize(vectors_MD.double(), dim=1)
        sides.append(_ranks((unit_MD[first_P.to(unit_MD.device)] * unit_MD[second_P.to(unit_MD.device)]).sum(1)))
    return float(torch.corrcoef(torch.stack(sides))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, of equal values their mean; float64."""
    _, place, times = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (times.cumsum(0) - (times - 1) / 2).double()[place]
    return ranks
