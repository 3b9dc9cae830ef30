from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from litdeploy.data import Data
from litdeploy.data.packed import METADATA_KEY, Header
from litdeploy.errors import DataError
from litdeploy.files import sha256_of

Opened = Callable[..., Data]
HEADER: dict[str, Any] = {
    "version": 1,
    "source": "pets",
    "fingerprint": "0f" * 32,
    "image_column": "image",
    "label_column": "label",
    "classes": ["cat", "dog", "emu"],
    "shape": [3, 4, 5],
    "images": {"train": 9, "test": 3},
    "source_images": {"train": 90, "test": 3},
    "test_share": 0.1,
}


def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "train.images": torch.randint(256, (9, 3, 4, 5), generator=random).to(torch.uint8),
        "train.labels": torch.arange(9) % 3,
        "test.images": torch.randint(256, (3, 3, 4, 5), generator=random).to(torch.uint8),
        "test.labels": torch.tensor([2, 0, 1]),
    }


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A packed file with these things of its header and its tensors changed; None takes one away."""

    def write(header: dict[str, Any] | str | None = None, **changes: Tensor | None) -> Path:
        every = tensors() | {name.replace("_", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor.contiguous() for name, tensor in every.items() if tensor is not None}
        text = header if isinstance(header, str) else json.dumps(HEADER | (header or {}))
        path = tmp_path / "pets.safetensors"
        save_file(kept, path, {METADATA_KEY: text})
        return path

    return write


@pytest.mark.parametrize("resident", [True, False])
def test_splits_classes_and_shape(written: Callable[..., Path], opened: Opened, resident: bool) -> None:
    path = written()
    data = opened(path, resident=resident)
    assert data.classes == ("cat", "dog", "emu")
    assert data.shape == (3, 4, 5)
    assert data.record().images == {"train": 6, "validation": 3, "test": 3}
    [(images, labels)] = data.test.batches(10)
    assert torch.equal(images, tensors()["test.images"])
    assert labels.tolist() == [2, 0, 1]
    # The caller may write to a batch, and not thereby to the file.
    images.zero_()
    assert torch.equal(next(data.test.batches(3))[0], tensors()["test.images"])


def test_the_fingerprint_is_the_files_own(written: Callable[..., Path], opened: Opened) -> None:
    before = opened(written()).record().fingerprint
    changed = tensors()["test.images"]
    changed[0, 0, 0, 0] ^= 1
    path = written(test_images=changed)
    after = opened(path).record().fingerprint
    assert len({before, after, HEADER["fingerprint"]}) == 3
    assert after == sha256_of(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "version 2 of the format; this litdeploy reads 1"),
        ({"version": "two"}, r"damaged \(version: "),
        ("{", r"damaged \(JSON: "),
        ("[" * 100_000, r"damaged \(JSON: "),
        ("3", r"damaged \(JSON: "),
        ({"classes": ["cat"]}, r"damaged \(classes: "),
        ({"classes": ["cat", "dog", "cat"]}, r"damaged \(classes: .*same name"),
        ({"classes": ["cat", "dog"]}, r"row 2 .* of split 'train' has the label 2, and there are 2 classes"),
        ({"shape": [3, 4]}, r"damaged \(shape"),
        ({"shape": [0, 4, 5]}, r"damaged \(shape"),
        ({"images": {}}, r"damaged \(images"),
        ({"images": {"train": 0}}, r"damaged \(images.train"),
        ({"images": {"../train": 1}}, r"damaged \(images"),
        ({"test_share": 1.5}, r"damaged \(test_share"),
        ({"more": 1}, r"damaged \(more: "),
        ({"shape": [3, 5, 4]}, r"'test.images' is U8 of shape \(3, 3, 4, 5\); .* U8 of shape \(3, 3, 5, 4\)"),
        ({"images": {"train": 9, "test": 4}}, r"'test.images' is U8 of shape \(3,.* \(4, 3, 4, 5\)"),
        ({"images": {"train": 9}}, r"'test.images' is U8 of shape .* it is not there"),
    ],
)
def test_a_header_that_is_damaged(written: Callable[..., Path], opened: Opened, header: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(written(header))
    assert "litdeploy data pack SOURCE --out" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, r"'test.labels' is not there; .* I64 of shape \(3,\)"),
        ({"train_images": None}, "'train.images' is not there"),
        ({"more": torch.zeros(1)}, r"'more' is F32 of shape \(1,\); .* not there"),
        ({"test_images": torch.zeros(3, 3, 4, 5)}, "'test.images' is F32"),
        ({"test_images": torch.zeros(3, 60, dtype=torch.uint8)}, r"is U8 of shape \(3, 60\)"),
        ({"test_labels": torch.zeros(3, dtype=torch.int32)}, "'test.labels' is I32"),
        ({"test_labels": torch.zeros(2, dtype=torch.int64)}, r"'test.labels' is I64 of shape \(2,\)"),
        ({"test_labels": torch.tensor([0, 3, 1])}, r"row 1 .* of split 'test' has the label 3, and there are 3"),
        ({"train_labels": torch.arange(9) - 1}, r"row 0 .* of split 'train' has the label -1"),
    ],
)
def test_tensors_that_do_not_fit(
    written: Callable[..., Path], opened: Opened, changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(written(**changes))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 600, -1])
def test_a_torn_file(written: Callable[..., Path], opened: Opened, kept: int) -> None:
    path = written()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        opened(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 0, 17])
def test_a_header_of_a_length_that_is_not_its_own(written: Callable[..., Path], opened: Opened, length: int) -> None:
    path = written()
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        opened(path)


def test_weights_are_no_dataset(tmp_path: Path, opened: Opened) -> None:
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "teacher.safetensors")
    with pytest.raises(DataError, match=r"not a packed dataset \(weights\?\)\. Pack one: litdeploy data pack"):
        opened(tmp_path / "teacher.safetensors")


def test_a_file_that_is_not_there(opened: Opened) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        opened("pets.safetensors")


def test_the_header_written_is_the_header_read() -> None:
    header = Header.model_validate(HEADER)
    assert Header.model_validate_json(header.model_dump_json()) == header
