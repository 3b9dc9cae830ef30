from __future__ import annotations

import pytest
import torch

from litdeploy.config.spec import InputSpec
from litdeploy.data import normalise
from litdeploy.errors import RunnerError
from litdeploy.runtime.adapter import InputAdapter, read_adapter

SPEC = InputSpec(shape=(3, 4, 5), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_pixels_are_found_again_in_normalised_images() -> None:
    pixels_NCHW = torch.arange(256, dtype=torch.uint8).repeat(15)[: 3 * 4 * 5 * 60].reshape(-1, 3, 4, 5)
    adapter = InputAdapter(dtype=torch.uint8, mean=SPEC.mean, std=SPEC.std)
    found = adapter.adapt(normalise(pixels_NCHW, SPEC))
    assert found.is_contiguous()
    assert torch.equal(found, pixels_NCHW.permute(0, 2, 3, 1))


def test_values_beyond_pixels_are_cut() -> None:
    adapter = InputAdapter(dtype=torch.uint8, mean=SPEC.mean, std=SPEC.std)
    found = adapter.adapt(torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 4, 5))
    assert found[0].max() == 0
    assert found[1].min() == 255


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_type_is_the_files(name: str, dtype: torch.dtype) -> None:
    adapter = read_adapter({"precision": "int8", "io_precision": name, "mean": "[0.5]", "std": "[0.5]"})
    assert adapter == InputAdapter("int8", dtype, (0.5,), (0.5,))
    batch = torch.randn(2, 1, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    taken = adapter.adapt(batch)
    assert taken.dtype == dtype
    assert taken.is_contiguous()
    assert not taken.requires_grad


def test_one_channel_has_the_strides_of_a_new_tensor() -> None:
    batch = torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last)
    assert batch.stride() != torch.empty(2, 1, 4, 5).stride()
    taken = InputAdapter().adapt(batch)
    assert taken.stride() == torch.empty(2, 1, 4, 5).stride()
    assert torch.equal(taken, batch)


def test_of_a_strangers_file_plain_float32_is_taken() -> None:
    assert read_adapter({}) == InputAdapter()


@pytest.mark.parametrize("value", ["[", "3", '["a"]', "[NaN]", "[" * 10**5, '{"a": 1}', "[true]"])
def test_metadata_that_are_no_numbers_are_refused(value: str) -> None:
    with pytest.raises(RunnerError, match=r"a\.onnx: its metadata under 'mean' is not a list"):
        read_adapter({"mean": value}, "a.onnx")


def test_pixels_of_other_channels_than_are_normalised_are_refused() -> None:
    adapter = read_adapter({"preprocessing": "embedded", "mean": "[0.5]", "std": "[0.5, 0.5]"})
    with pytest.raises(RunnerError, match="the normalization of 1 channels, but the batch has 3"):
        adapter.adapt(torch.zeros(1, 3, 2, 2))
