"""Files that a stranger may have written: their kind, size and place are looked at before anything is read."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

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
