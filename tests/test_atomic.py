from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litdeploy.atomic import remove_partial, sha256_of, write_whole


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("whole")

    def fail() -> None:
        with write_whole(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert path.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_of_any_writer_may_be_read_as_others_that_are_made_here(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with write_whole(tmp_path / "weights.safetensors") as temporary:
        save_file({"weight": torch.ones(1)}, temporary)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "weights.safetensors")]
    assert modes[0] == modes[1]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".student.safetensors.123.partial", "student.safetensors", ".lock"):
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "student.safetensors"]


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
