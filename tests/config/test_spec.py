from __future__ import annotations

import pytest
from pydantic import ValidationError

from litdeploy.config.spec import (
    AnyInput,
    Free,
    InputSpec,
    InputTensor,
    NetworkSpec,
    TensorInput,
    TokenInput,
    input_of,
    parse_normalisation,
)
from litdeploy.errors import SettingsError


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


def test_a_spec_that_was_written_before_there_were_kinds_is_an_images() -> None:
    text = '{"name":"resnet","input":{"shape":[1,8,8],"mean":[0.5],"std":[0.5]},"plan":{"layer1":[0,4]}}'
    spec = NetworkSpec.model_validate_json(text)
    assert spec.input == InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,))
    assert "kind" not in spec.input.model_dump()


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,)),
        TokenInput(length=64, vocabulary=100),
        TokenInput(length=64, vocabulary=100, fixed=True),
        TensorInput.of((1, 16000), "waveform"),
        TensorInput(tensors=(InputTensor("x", "float32", (2, 3, 4, 5)), InputTensor("kind", "int64", (), below=7))),
    ],
)
def test_every_kind_of_input_survives_json_and_the_metadata_of_a_file(spec: AnyInput) -> None:
    network = NetworkSpec(name="any", input=spec)
    assert NetworkSpec.model_validate_json(network.model_dump_json()) == network
    assert input_of(spec.metadata()) == spec


def test_an_input_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="image"):
        NetworkSpec.model_validate_json('{"name": "any", "input": {"kind": "sound", "length": 3}}')
    for strange in ("5", "[]", '"image"', "null", "{}"):
        with pytest.raises(ValidationError):
            NetworkSpec.model_validate_json(f'{{"name": "any", "input": {strange}}}')
    assert input_of({"input": '{"kind": "sound"}'}) is None
    assert input_of({"input": "5"}) is None
    assert input_of({"mean": "[0.5]"}) is None


def test_texts_are_of_any_length_unless_one_is_asked_for() -> None:
    spec = TokenInput(length=64, vocabulary=100)
    assert [tensor.shape for tensor in spec.tensors] == [(Free("length", 64),)] * 2
    fixed = spec.override(None, (16,), "bert")
    assert [(tensor.name, tensor.shape) for tensor in fixed.tensors] == [
        ("input_ids", (16,)),
        ("attention_mask", (16,)),
    ]


@pytest.mark.parametrize(
    ("normalise", "shape", "message"),
    [
        ("half", None, "Leave --normalise out"),
        (None, (3, 8, 8), "Give one number: --input-shape 64"),
        (None, (65,), "up to 64 tokens"),
    ],
)
def test_what_is_said_of_images_does_not_fit_texts(
    normalise: str | None, shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        TokenInput(length=64, vocabulary=100).override(normalise, shape, "bert")


def test_a_length_does_not_fit_images() -> None:
    with pytest.raises(SettingsError, match="--input-shape 3,32,32"):
        InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,)).override(None, (128,), "resnet")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ((), "at least 1"),
        ((InputTensor("x", "float32", (3,)), InputTensor("x", "float32", (3,))), "different names"),
        ((InputTensor("not a name", "float32", (3,)),), "parameter of forward"),
        ((InputTensor("x", "float32", (0, 3)),), "at least 1"),
        ((InputTensor("x", "float32", (Free("length"),)),), "fixed"),
        ((InputTensor("x", "float32", (2**13, 2**13)),), "at most"),
    ],
)
def test_tensors_that_no_network_takes_are_refused(tensors: tuple[InputTensor, ...], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TensorInput(tensors=tensors)


def test_the_shape_of_a_single_tensor_is_overridden() -> None:
    signal = TensorInput.of((1, 16000), "waveform")
    assert signal.override(None, (1, 8000), "net") == TensorInput.of((1, 8000), "waveform")
    for normalise, shape in (("imagenet", None), (None, (8000,))):
        with pytest.raises(SettingsError, match="waveform"):
            signal.override(normalise, shape, "net")
