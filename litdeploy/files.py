"""Files: read with bounds, since a stranger may have written them; written whole or not at all; and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litdeploy.errors import BundleError

# A manifest of ten exports has some 30 KB.
MOST_BYTES = 16 * 2**20
# The whole record of a training: an epoch takes half a kilobyte.
MOST_RECORD_BYTES = 64 * 2**20


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file that has no reason to be large.

    Raises:
        OSError: it cannot be read, is no regular file (a device or a pipe never ends), or has more than `most` bytes.
    """
    # Not to wait for somebody to write into a pipe.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(most + 1) if about.st_size <= most else b""
        if about.st_size > most or len(content) > most:
            raise OSError(errno.EFBIG, f"larger than the {most:,} bytes that such a file may have", str(path))
        return content


def is_file(path: Path) -> bool:
    """Whether there is a regular file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """As `is_file`, for a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder once its links and `..` are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a NUL
        return False


def parse_json(text: str | bytes) -> Any:
    """What a stranger's JSON holds.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# What a file is called while it is written: .NAME.PID.partial
PARTIAL = ".*.partial"

# What makes a file unwritable and is no fault of ours: space, quota, limit, rights, a disk that fails.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Removes what `write_whole` had begun in this folder when its process was killed."""
    for path in folder.glob(PARTIAL):
        remove(path)


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there appears under `path` only when it is whole.

    Raises:
        BundleError: no space left, no right to write there, or a disk that fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # safetensors leaves files that none but their owner may read; these may be read as any other made here.
            temporary.touch()
            mode = temporary.stat().st_mode
            temporary.unlink()
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
            f"{path}: cannot be written ({error.strerror}). What was there before is as it was. Make room there, or "
            "the right to write, or choose another folder."
        ) from error


def sync_folder(folder: Path) -> None:
    """A rename lasts once the folder is on the disk too. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
