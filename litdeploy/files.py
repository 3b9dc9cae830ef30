"""Read files from strangers within limits; write files whole or not at all; remove only what litdeploy wrote."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError

# A manifest with ten exports has about 30 KB.
MOST_BYTES = 16 * 2**20
# The complete log of a training run: an epoch takes half a kilobyte.
MOST_RECORD_BYTES = 64 * 2**20
# The name of a file while `write_whole` writes it: .NAME.PID.partial
_PARTIAL = re.compile(r"\..+\.\d+\.partial")
# Errors of the disk or of permissions, which are not bugs: space, quota, limit, rights, I/O.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting: a pipe or a device never ends.

    Raises:
        OSError: the file cannot be read, or is not a regular file (links are followed).
    """
    # O_NONBLOCK: opening a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file that has no reason to be large.

    Raises:
        OSError: the file cannot be read, is not a regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
        if size > most or len(content) > most:
            raise OSError(errno.EFBIG, f"larger than the {most:,} bytes that a file of this kind may have", str(path))
        return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a stranger.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_file(path: Path) -> bool:
    """Whether a regular file exists; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder exists; False for a name that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder after its links and `..` are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a NUL
        return False


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; its file replaces `path` only once it is complete and on the disk.

    A link at `path` is replaced and never followed, since a stranger may have put it there.

    Raises:
        BundleError: no space left, no right to write, or a failing disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mode = _fresh_mode(temporary)
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _UNWRITABLE and not isinstance(error, NotADirectoryError):
            raise
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}). The previous file, if any, is unchanged. Free space there, "
            "allow writing, or choose another folder."
        ) from error


def _fresh_mode(path: Path) -> int:
    """Permissions of a new file at `path`, which is removed again: safetensors writes files that only their owner can
    read."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, by `write_whole`; raises as it does."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Windows has no call for this."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that `write_whole` did not complete."""
    return _PARTIAL.fullmatch(name) is not None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists. A link is removed, and not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove files that a killed `write_whole` left in this folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_partial(path.name):
            remove(path)


def remove_matching(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files in a folder whose names match, and the folder itself once it is empty.

    For folders that litdeploy made and to which the user may have added files.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_partial(path.name) or any(fnmatch(path.name, pattern) for pattern in patterns):
            remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()
