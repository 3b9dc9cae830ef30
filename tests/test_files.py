from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litdeploy.files import (
    is_file,
    is_folder,
    is_inside,
    parse_json,
    read_small,
    remove_partial,
    sha256_of,
    write_whole,
)


def test_a_small_file_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than the 4 bytes"):
        read_small(path, 4)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            read_small(path)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "absent"])
def test_names_that_no_file_can_have_are_none(name: str) -> None:
    assert not is_file(Path(name))
    assert not is_folder(Path(name))


def test_links_and_dots_are_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in" / "circle")
    assert is_inside(tmp_path / "in" / "a", tmp_path / "in")
    for name in ("../a", "link/a", "/etc", "circle", "a\0b"):
        assert not is_inside(tmp_path / "in" / name, tmp_path / "in")


def test_json_without_end_is_no_json() -> None:
    with pytest.raises(ValueError, match="deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)


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
