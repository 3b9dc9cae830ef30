from __future__ import annotations

import os
from pathlib import Path

import pytest

from litdeploy.files import is_file, is_folder, is_inside, parse_json, read_small


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
