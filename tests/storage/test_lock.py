from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from litdeploy.errors import BundleError
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.lock import locked

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys; from litdeploy.storage.bundle import Bundle\n"
    "with Bundle(sys.argv[1]).lock(): print('held'), sys.stdin.read()"
)


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a bundle's lock."""
    command = [sys.executable, "-u", "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=variables, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        with pytest.raises(BundleError, match=rf"process {holder.pid} on .*, since 20.*--out"), Bundle(tmp_path).lock():
            pass
        holder.communicate("end")
        with Bundle(tmp_path).lock():
            pass


def test_a_dead_holders_lock_is_free(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
        assert (tmp_path / ".lock.json").is_file()  # what it said of itself holds nobody up
        with Bundle(tmp_path).lock():
            pass
    assert not (tmp_path / ".lock.json").exists()


def test_inside_it_is_held_already(tmp_path: Path) -> None:
    with Bundle(tmp_path).lock():
        with Bundle(tmp_path / ".." / tmp_path.name).lock():
            pass
        assert (tmp_path / ".lock.json").is_file()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"x" * 100_000, b'{"pid": "1", "host": 2}', b'{"pid":1,"host":"h","since":"s","command":"c"}'],
)
def test_what_a_holder_says_is_not_trusted(tmp_path: Path, content: bytes) -> None:
    with held(tmp_path):
        (tmp_path / ".lock.json").write_bytes(content)
        with pytest.raises(BundleError, match="another process is at work"), Bundle(tmp_path).lock():
            pass


def test_orders_to_the_terminal_are_left_out(tmp_path: Path) -> None:
    with held(tmp_path):
        text = '{"pid":1,"host":"\\u001b[2J","since":"","command":"a\\nb"}'
        (tmp_path / ".lock.json").write_text(text)
        with pytest.raises(BundleError) as told, Bundle(tmp_path).lock():
            pass
    assert "\x1b" not in str(told.value)
    assert "a?b" in str(told.value)


def test_other_peoples_folders_get_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BundleError, match=r"thesis\.tex"), Bundle(tmp_path).lock():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written"), locked(tmp_path / "file" / ".lock", "it", "go away"):
        pass
