from __future__ import annotations

import math

import pytest
import torch

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError, NetworkError, RunnerError
from litdeploy.storage.records import Measures, Parity
from litdeploy.tasks import TASKS

TASK = TASKS["tree"]
SPEC = InputSpec(shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
NONE = torch.full((4,), -1)
Named = dict[str, torch.Tensor]


def answer(seed: int = 0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        "boxes": 100 * torch.rand(4, 6, 4, generator=generator),
        "score": torch.randn(4, generator=generator),
        "label": torch.randint(0, 9, (4, 6), generator=generator),
    }


def changed(values: Named, **changes: torch.Tensor) -> Named:
    return {**values, **changes}


def test_each_tensor_counts_alike_in_the_loss_whatever_its_unit() -> None:
    teacher = answer()
    near = changed(teacher, boxes=teacher["boxes"] + teacher["boxes"].std(correction=0))
    assert TASK.loss(near, teacher, NONE, 0.0, 6.0).item() == pytest.approx(0.5, rel=1e-4)
    near = changed(teacher, score=teacher["score"] - teacher["score"].std(correction=0))
    assert TASK.loss(near, teacher, NONE, 0.0, 6.0).item() == pytest.approx(0.5, rel=1e-4)
    assert TASK.loss(teacher, teacher, NONE, 0.0, 6.0).item() == 0
    student = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in answer(1).items()}
    TASK.loss(student, teacher, NONE, 0.0, 6.0).backward()  # type: ignore[no-untyped-call]
    assert student["boxes"].grad is not None
    assert student["score"].grad is not None


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_tensor_gives_a_finite_loss(value: float) -> None:
    """A batch of one regression has no variance."""
    teacher, student = {"output": torch.full((1,), value)}, {"output": torch.full((1,), value + 1, requires_grad=True)}
    loss = TASK.loss(student, teacher, NONE, 0.0, 6.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert student["output"].grad is not None
    assert student["output"].grad.isfinite().all()


def test_integers_alone_cannot_be_learned() -> None:
    only = {"label": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(NetworkError, match=r"\(label\) are integers.*--beta 0"):
        TASK.loss(only, only, NONE, 0.0, 6.0)


def test_errors_are_relative_to_the_teachers_tensors() -> None:
    teacher = answer()
    student = changed(teacher, score=1.1 * teacher["score"], label=teacher["label"].clone())
    student["label"][0, 0] += 1
    batches = [(torch.zeros(4, 3, 8, 8), NONE)] * 2
    found = TASK.evaluate(lambda _: student, batches, SPEC, lambda _: teacher)
    assert isinstance(found, Measures)
    assert found.images == 8
    assert list(found.values) == ["relative_error", "relative_error/boxes", "relative_error/score", "equal/label"]
    assert found.values["relative_error/score"] == pytest.approx(0.1)
    assert found.values["relative_error"] == pytest.approx(0.05)
    assert found.values["equal/label"] == pytest.approx(23 / 24)
    assert TASK.figure(found) == "5.00 %"
    assert TASK.key(found) == -found.values["relative_error"]
    labels = [row.label for row in TASK.rows({}, {"test": found})]
    assert labels[1:] == ["Relative error, boxes, test", "Relative error, score, test", "Equal integers, label, test"]
    with pytest.raises(DataError, match="nothing to evaluate on"):
        TASK.evaluate(lambda _: student, [], SPEC, lambda _: teacher)


def test_what_is_not_finite_is_the_largest_error() -> None:
    for teacher, student in ((0.0, 1.0), (1.0, math.nan), (1.0, math.inf)):
        one = [{"output": torch.full((2,), value)} for value in (teacher, student)]
        found = TASK.evaluate(lambda _, one=one: one[1], [(torch.zeros(2), NONE)], SPEC, lambda _, one=one: one[0])
        assert isinstance(found, Measures)
        assert found.values == {"relative_error": 1e6}


def test_the_worst_tensor_is_named() -> None:
    expected = answer()
    found = TASK.compare(expected, changed(expected, score=expected["score"] + 1), 4, Tolerance(), SPEC)
    assert not found.within
    assert found.tensor == "score"
    assert found.max_absolute == pytest.approx(1)
    found = TASK.compare(expected, changed(expected, boxes=expected["boxes"] + 1e-3), 4, Tolerance(), SPEC)
    assert found.within, "a hundredth of a thousandth of the largest box"
    found = TASK.compare(expected, changed(expected, boxes=expected["boxes"] * math.nan), 4, Tolerance(), SPEC)
    assert not found.within
    assert (found.tensor, found.max_absolute) == ("boxes", None)
    parity = Parity(reference="eager", candidate="onnxruntime", tolerance=Tolerance(), batches=(found,), within=False)
    assert "a value is NaN or infinite in boxes" in parity.summary()


def test_integers_are_compared_for_equality() -> None:
    expected = answer()
    other = changed(expected, label=expected["label"] + 1)
    found = TASK.compare(expected, other, 4, Tolerance(), SPEC)
    assert found.top1 == 0
    assert not found.within


@pytest.mark.parametrize("name", ["boxes", "label"])
def test_other_tensors_are_refused(name: str) -> None:
    expected = answer()
    lacking = {key: value for key, value in expected.items() if key != name}
    for found in (lacking, changed(expected, **{name: expected[name][:, :2]})):
        with pytest.raises(RunnerError, match=f"cannot be compared with outputs of .*{name}"):
            TASK.compare(expected, found, 4, Tolerance(), SPEC)


def test_labels_are_refused() -> None:
    spec = NetworkSpec(name="detector", input=SPEC, task="tree")
    with pytest.raises(DataError, match=r"not compared with classes.*--labels none"):
        TASK.check_classes("cats", ("a", "b"), False, spec, 0)
    assert TASK.class_count((4, 8, 8), SPEC) == 0
