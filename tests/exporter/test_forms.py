from __future__ import annotations

import pytest
import torch

from litdeploy.config.recipe import DataSettings
from litdeploy.data import open_data
from litdeploy.errors import DataError
from litdeploy.exporter.forms import FORMS, Calibration, file_of, form_of, kind_of
from litdeploy.networks import Network
from litdeploy.runtime import RUNNERS


@pytest.mark.parametrize("name", FORMS)
def test_each_form_has_a_runner_and_names_of_its_own(name: str) -> None:
    form = FORMS[name]
    assert form.runner in RUNNERS
    assert form.versions()
    for precision in form.precisions:
        assert form_of(kind_of(name, precision)) is form
        assert file_of(name, precision).endswith(form.suffix)
    kinds = [kind_of(each, precision) for each in FORMS for precision in FORMS[each].precisions]
    files = [file_of(each, precision) for each in FORMS for precision in FORMS[each].precisions]
    assert len(set(kinds)) == len(set(files)) == len(kinds)


def test_the_first_file_keeps_its_name() -> None:
    assert (kind_of("onnx", "fp32"), file_of("onnx", "fp32")) == ("onnx", "student.onnx")
    assert (kind_of("onnx", "fp16"), file_of("onnx", "fp16")) == ("onnx-fp16", "student.fp16.onnx")


def test_calibration_takes_the_same_training_images_each_time(student: Network) -> None:
    data = open_data(DataSettings(source="digits"), torch.device("cpu"), 0)
    found = [Calibration(data, student, 32).inputs for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].shape == (32, 1, 8, 8)
    assert found[0].dtype == torch.float32


def test_fewer_training_images_than_asked_are_an_error(student: Network) -> None:
    data = open_data(DataSettings(source="digits"), torch.device("cpu"), 0)
    count = len(data.train)
    with pytest.raises(
        DataError, match=f"has {count} training images, and {count + 1} .* --calibration-images {count}"
    ):
        _ = Calibration(data, student, count + 1).inputs
