"""Tokens: logits for each token of a text (N, L, V): token classification, masked and causal language models.

A vocabulary may be large: nothing here holds (N, L, V) in double precision, and the loss keeps no softmax of all of
it.

Shape suffixes: N texts, L tokens, V classes or vocabulary, M tokens of several texts, together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litdeploy.batch import Batch, picked, size_of, tensors_of
from litdeploy.config.spec import AnyInput, NetworkSpec, TokenInput
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import BatchParity, Measures
from litdeploy.tasks.task import (
    Batches,
    Inference,
    Measure,
    Task,
    begun,
    check_shapes,
    counted,
    divergence,
    finite,
    needed,
    without_labels,
)

# Values of logits that are in double precision or softmaxed at a time: 64 MB in float32.
_AT_ONCE = 2**24
# Labels of tokens that have none: ours, and transformers' and torch's.
_UNLABELED = -100


class TokensTask(Task[Measures]):
    """Logits of each token, compared with the teacher's; with labels of tokens, with those."""

    name = "tokens"
    score = Measures
    output = "logits of tokens"
    output_name = "logits"
    makes = "gives logits for each token"
    advice = "Choose another method: --method lit"
    measure = "agreement"
    heading = "Size and agreement"
    note = (
        "Logits are compared at each token of a text, without padding. The perplexity is of a causal language model on "
        "the texts themselves."
    )
    side_by_side = "Agreement of each student with its teacher, token by token"
    measures = (
        Measure("agreement", "Same class as the teacher, of all tokens", " %", 100, 2),
        Measure("accuracy", "Accuracy, of all labeled tokens", " %", 100, 2, labeled=True),
        Measure("divergence", "KL divergence from the teacher", better="lower"),
        Measure("perplexity", "Perplexity", decimals=2, better="lower"),
        Measure("teacher_perplexity", "Perplexity of the teacher", decimals=2, better="lower"),
    )

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return sizes[1] if len(sizes) == 2 and isinstance(sizes[1], int) else None

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return ("length", classes)

    def output_labels(self, spec: NetworkSpec) -> tuple[str, ...]:
        return spec.classes

    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        if len(classes) != wanted:
            super().check_classes(source, classes, attributes, spec, wanted)

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over the tokens that count."""
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        there_NL = counted(student, inputs)
        count = there_NL.sum().clamp(min=1)
        parts = [
            checkpoint(_divergence, own, other, there, temperature, use_reentrant=False, preserve_rng_state=False)
            for own, other, there in _in_parts(student, teacher.detach(), there_NL)
        ]
        return temperature**2 * torch.stack(parts).sum() / count

    def hard_loss(self, student: Batch, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over the labeled tokens."""
        assert isinstance(student, Tensor)
        _check_labels(labels, student)
        return F.cross_entropy(student.flatten(0, 1), _ignoring(labels).flatten(), ignore_index=_UNLABELED)

    def evaluate(
        self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None
    ) -> Measures:
        """`accuracy` with labels of tokens; without them `agreement` and `divergence`, and of a causal language model
        the `perplexity` of both. See `Task.evaluate`."""
        sums: dict[str, Tensor | float] = {}
        samples = 0
        generates: bool | None = None
        _, batches = begun(batches)
        with torch.no_grad():
            for batch, labels in batches:
                found = run(batch)
                assert isinstance(found, Tensor)
                if not without_labels(labels):
                    _check_labels(labels, found)
                    _add(sums, _right(found, labels))
                else:
                    expected = needed(reference)(batch)
                    assert isinstance(expected, Tensor)
                    check_shapes(found, expected)
                    _add(sums, _alike(found, expected, counted(found, batch)))
                    if generates is None:
                        generates = _is_causal_language_model(run, batch, found, spec)
                    if generates:
                        own, others = (_surprise(logits, batch) for logits in (found, expected))
                        _add(sums, {"own": own[0], "others": others[0], "following": own[1]})
                samples += size_of(batch)
        return Measures(task="tokens", values=finite(_means(sums)), images=samples)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """|candidate − reference| ≤ atol + rtol · max |reference|, and the same class at a share of at least top1 of
        the tokens."""
        assert isinstance(expected, Tensor)
        assert isinstance(found, Tensor)
        absolute = largest = 0.0
        same = 0
        for one, other in _in_parts(expected, found):
            absolute = max(absolute, (other.double() - one.double()).abs().max().nan_to_num(nan=math.inf).item())
            largest = max(largest, one.abs().max().nan_to_num(nan=math.inf).item())
            same += int((one.argmax(-1) == other.argmax(-1)).sum())
        top1 = same / expected[..., 0].numel()
        whole = math.isfinite(absolute) and math.isfinite(largest)
        near = whole and absolute <= tolerance.atol + tolerance.rtol * largest
        return BatchParity(
            batch_size=batch_size,
            images=len(expected),
            max_absolute=absolute if whole else None,
            max_relative=absolute / max(largest, torch.finfo(torch.float64).tiny) if whole else None,
            top1=top1,
            within=near and top1 >= tolerance.top1,
        )


def _in_parts(logits_NLV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the tokens of all texts, of each tensor: (M, V), or (M) of a mask."""
    tokens = max(1, _AT_ONCE // logits_NLV.shape[-1])
    return zip(*(torch.split(each.flatten(0, 1), tokens) for each in (logits_NLV, *others)), strict=True)


def _divergence(student_MV: Tensor, teacher_MV: Tensor, there_M: Tensor, temperature: float) -> Tensor:
    """KL(softmax(T/τ) ‖ softmax(S/τ)), summed over the tokens that count."""
    each_M = divergence(student_MV.float(), teacher_MV.float(), temperature)
    return torch.where(there_M.bool(), each_M, 0.0).sum()


def _alike(found: Tensor, expected: Tensor, there_NL: Tensor) -> dict[str, Tensor]:
    same, apart = [], []
    for own, other, there_M in _in_parts(found, expected, there_NL):
        same.append(((own.argmax(1) == other.argmax(1)) & there_M.bool()).sum().double())
        apart.append(_divergence(own, other, there_M, 1.0).double())
    return {"same": torch.stack(same).sum(), "divergence": torch.stack(apart).sum(), "tokens": there_NL.sum()}


def _right(found: Tensor, labels_NL: Tensor) -> dict[str, Tensor]:
    known_NL = labels_NL >= 0
    return {"right": ((found.argmax(-1) == labels_NL) & known_NL).sum(), "known": known_NL.sum()}


def _surprise(logits_NLV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """−log p of each token but the first, given those before it, summed, and their number."""
    ids_NL = tensors_of(batch)[0]
    there_NL = counted(logits_NLV, batch).bool()
    following_NL = there_NL[:, 1:] & there_NL[:, :-1]
    sums = [
        torch.where(there_M, F.cross_entropy(each_MV.float(), ids_M, reduction="none"), 0.0).sum().double()
        for each_MV, ids_M, there_M in _in_parts(logits_NLV[:, :-1], ids_NL[:, 1:], following_NL)
    ]
    return torch.stack(sums).sum(), following_NL.sum()


def _is_causal_language_model(run: Inference, batch: Batch, logits_NLV: Tensor, spec: AnyInput) -> bool:
    """Whether the classes are the vocabulary, and a text's last token changes nothing before it."""
    ids_NL = tensors_of(batch)[0]
    if not isinstance(spec, TokenInput) or logits_NLV.shape[-1] != spec.vocabulary or ids_NL.shape[1] < 2:
        return False
    last_N = counted(logits_NLV[:1], picked(batch, slice(1))).sum(1).long() - 1
    if last_N.item() < 1:
        return False
    other_NL = ids_NL[:1].clone()
    other_NL[0, last_N] = (other_NL[0, last_N] + 1) % spec.vocabulary
    first = picked(batch, slice(1))
    name = next(iter(first)) if isinstance(first, dict) else ""
    changed = run({**first, name: other_NL} if isinstance(first, dict) else other_NL)
    assert isinstance(changed, Tensor)
    before, after = logits_NLV[0, : last_N.item()].float(), changed[0, : last_N.item()].float()
    return torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def _add(sums: dict[str, Tensor | float], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def _means(sums: dict[str, Tensor | float]) -> dict[str, float]:
    total = {name: float(value) for name, value in sums.items()}
    if "known" in total:
        return {"accuracy": total["right"] / max(total["known"], 1)}
    tokens = max(total["tokens"], 1)
    values = {"agreement": total["same"] / tokens, "divergence": total["divergence"] / tokens}
    if total.get("following"):
        sides = {"perplexity": total["own"], "teacher_perplexity": total["others"]}
        values |= {name: math.exp(min(surprise / total["following"], 700)) for name, surprise in sides.items()}
    return values


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:2]:
        raise DataError(
            f"a label for each token is needed, {tuple(logits.shape[:2])}, and the labels have the shape "
            f"{tuple(labels.shape)}. Give those, −100 for tokens that have none, or leave the labels unused: "
            "--labels none"
        )


def _ignoring(labels_NL: Tensor) -> Tensor:
    return torch.where(labels_NL < 0, _UNLABELED, labels_NL)
