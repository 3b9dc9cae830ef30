"""Files that appear whole or not at all, their hashes, and what a killed process leaves of them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litdeploy.errors import BundleError

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
