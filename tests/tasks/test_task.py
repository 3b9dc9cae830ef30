from __future__ import annotations

import pytest

from litdeploy.config.spec import (
    AnyInput,
    CharacterInput,
    InputSpec,
    NetworkSpec,
    TensorInput,
    TokenInput,
    TranslationInput,
)
from litdeploy.errors import StudentError
from litdeploy.storage.records import Accuracy, Likeness, ScoredRecord
from litdeploy.tasks import TASKS, task_of, task_of_scores

IMAGES = InputSpec(shape=(3, 8, 6), mean=(0.5,) * 3, std=(0.5,) * 3)
TRANSLATED = TranslationInput(images=IMAGES, domains=4)
INPUTS: list[tuple[AnyInput, str]] = [
    (IMAGES, "classification"),
    (TokenInput(length=8, vocabulary=9), "classification"),
    (CharacterInput(length=8), "classification"),
    (TRANSLATED, "translation"),
    (TensorInput.of((1, 64)), "classification"),
]


@pytest.mark.parametrize(("spec", "name"), INPUTS)
def test_an_input_and_a_spec_have_the_same_task(spec: AnyInput, name: str) -> None:
    assert task_of(spec) is task_of(NetworkSpec(name="made", input=spec)) is TASKS[name]


def test_a_file_that_states_no_input_is_a_classifier() -> None:
    assert task_of(None).name == "classification"


def test_scores_name_their_task() -> None:
    scores = {"test": Likeness(psnr=30, ssim=1, images=2)}
    assert task_of_scores({}, scores).name == "translation"
    assert task_of_scores({"test": Accuracy(top1=1, loss=0, images=2)}).name == task_of_scores({}).name
    record = ScoredRecord(**ScoredRecord.keyed(scores))
    assert (record.accuracy, record.likeness, record.scores) == ({}, scores, scores)


@pytest.mark.parametrize("name", TASKS)
def test_each_row_says_all_that_others_ask(name: str) -> None:
    task = TASKS[name]
    asked = ("score", "output", "output_name", "makes", "advice", "measure", "heading", "side_by_side", "curves")
    assert all(getattr(task, attribute) for attribute in asked)
    assert task.name == name
    assert not (task.labeled and task.needs_reference)
    assert task.labeled or task.needs_teacher(labeled=False)


def test_an_output_that_does_not_fit_has_no_classes() -> None:
    assert task_of(IMAGES).class_count((7,), IMAGES) == 7
    assert task_of(IMAGES).class_count(("classes",), IMAGES) is None
    assert task_of(IMAGES).class_count((7, 8), IMAGES) is None
    assert task_of(TRANSLATED).class_count((3, 8, 6), TRANSLATED) == 4
    assert task_of(TRANSLATED).class_count((3, 8, 8), TRANSLATED) is None
    assert task_of(TRANSLATED).output_shape(TRANSLATED, 4) == (3, 8, 6)
    assert task_of(IMAGES).output_shape(IMAGES, 4) == (4,)


def test_an_objective_learns_by_sections_or_by_the_output() -> None:
    classification, translation = TASKS["classification"], TASKS["translation"]
    for task in (classification, translation):
        task.check_objective("sections", "--method lit", "made")
        task.check_objective(task.output, "--method lit", "made")
    with pytest.raises(
        StudentError, match=r"--method kd learns by logits of classes, and G makes images\. Give --method lit"
    ):
        translation.check_objective("logits", "--method kd", "G")
    with pytest.raises(StudentError, match="learns by images, and resnet classifies"):
        classification.check_objective("images", "--method lit", "resnet")


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("classification", Accuracy(top1=0.8, loss=2.0, images=5), Accuracy(top1=0.6, loss=0.1, images=5)),
        ("translation", Likeness(psnr=30.0, ssim=0.5, images=5), Likeness(psnr=20.0, ssim=0.9, images=5)),
    ],
)
def test_the_better_of_two_scores_has_the_larger_key(name: str, better: object, worse: object) -> None:
    task = TASKS[name]
    assert task.key(better) > task.key(worse)
