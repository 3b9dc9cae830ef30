from __future__ import annotations

import pytest
from pydantic import ValidationError

from litdeploy.errors import SettingsError
from litdeploy.spec import InputSpec, NetworkSpec, parse_normalisation


def test_named_and_numeric_normalisations() -> None:
    assert parse_normalisation("imagenet", 3)[0] == (0.485, 0.456, 0.406)
    assert parse_normalisation("0.1,0.2:0.3,0.4", 2) == ((0.1, 0.2), (0.3, 0.4))
    mean, std = parse_normalisation("imagenet", 1)
    assert mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert len(std) == 1


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("imagnet", 3),
        ("imagenet", 4),
        ("0.1,0.2:0.3", 2),
        ("0.1:0.0", 1),
        ("0.1:nan", 1),
        ("0.1:0.2:0.3", 1),
        ("0.1", 1),
    ],
)
def test_what_is_no_normalisation_is_refused(text: str, channels: int) -> None:
    with pytest.raises(SettingsError, match="--normalise"):
        parse_normalisation(text, channels)


def test_an_input_spec_needs_one_number_a_channel() -> None:
    with pytest.raises(ValidationError, match="each of the 3 channels"):
        InputSpec(shape=(3, 8, 8), mean=(0.5,), std=(0.5,))


def test_a_spec_survives_json() -> None:
    spec = NetworkSpec(
        name="resnet",
        arguments={"depth": 56, "shortcut": "A"},
        input=InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,)),
        classes=("zero", "one"),
        plan={"layer1": (0, 4, 8)},
    )
    assert NetworkSpec.model_validate_json(spec.model_dump_json()) == spec
