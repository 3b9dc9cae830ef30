from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.errors import TrainingError
from litdeploy.trainer.cache_files import LAST, CacheFiles


def opened(folder: Path) -> list[torch.Tensor]:
    """The two tensors of a folder."""
    files = CacheFiles(folder, {"teacher": "a"})
    found = [files.tensor("logits", (3, 2), torch.float32), files.tensor(LAST, (3,), torch.uint8)]
    files.flush()
    return found


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    logits, filled = opened(tmp_path / "features")
    assert not logits.any()
    logits[1], filled[1] = torch.tensor([1.5, -2.0]), 1
    again, still = opened(tmp_path / "features")
    assert torch.equal(again, logits)
    assert still.tolist() == [0, 1, 0]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photograph.jpg").write_bytes(b"x")
    with pytest.raises(TrainingError, match="no feature cache, and not empty"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photograph.jpg"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_a_damaged_key_is_told(tmp_path: Path, text: str) -> None:
    opened(tmp_path)
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(TrainingError, match=r"key.json: .*--feature-cache-dir"):
        opened(tmp_path)


def test_a_file_of_another_size_is_told(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "logits.bin").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"logits.bin: .*--feature-cache-dir"):
        opened(tmp_path)


def test_a_file_that_is_gone_is_told_once_all_were_there(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "logits.bin").unlink()
    with pytest.raises(TrainingError, match=r"logits.bin: has 0 bytes instead of 24"):
        opened(tmp_path)
