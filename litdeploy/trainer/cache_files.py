"""The feature cache's files: memory-mapped tensors in a folder, and a key that says what they were computed from."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litdeploy.errors import TrainingError
from litdeploy.files import parse_json, read_small, write_whole

# Another one is not read.
_SCHEMA = 2
_KEY = "key.json"
# The tensor that is made last: once its file is there, all of them are.
LAST = "filled"


class CacheFiles:
    """Tensors in a folder. What is written to them is there for other runs under the same key.

    Args:
        folder: is made, where it is missing.
        key: what the tensors are computed from.

    Raises:
        TrainingError: the folder holds something else, or its key cannot be read.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        _claim(folder, key)
        self._folder = folder
        self._names: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that name, on the CPU: as it was left, or of zeros.

        Raises:
            TrainingError: its file is of another size, or cannot be made.
        """
        path, size = self._file(name), math.prod(shape)
        if path.is_symlink():  # written through, it would be another file
            raise TrainingError(f"{path}: is a link. Delete it, or give --feature-cache-dir another folder.")
        found = path.stat().st_size if path.is_file() else 0
        begun = self._file(LAST).is_file()
        if found != size * dtype.itemsize and (found or begun):
            raise TrainingError(
                f"{path}: has {found:,} bytes instead of {size * dtype.itemsize:,}. Delete {self._folder}, or give "
                "--feature-cache-dir another folder."
            )
        _reserve(path, size * dtype.itemsize)
        self._names.append(name)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def flush(self) -> None:
        """Brings all of them to the disk, in the order in which they were made."""
        for name in self._names:
            with self._file(name).open("rb+") as file:
                os.fsync(file.fileno())

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.bin"


def _reserve(path: Path, size: int) -> None:
    """Makes the file, of zeros, or fills its holes: writing to a mapped page for which there is no space kills.

    Raises:
        TrainingError: there is no space for it, or no right to write it.
    """
    try:
        with path.open("rb+" if path.is_file() else "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # a file system that cannot reserve; the C library may try for it
            return
        raise TrainingError(
            f"{path}: the teacher's features cannot be kept there ({error.strerror}). Make room, give "
            "--feature-cache-dir another folder, or train without: --feature-cache off"
        ) from None


def _claim(folder: Path, key: Mapping[str, Any]) -> None:
    """Makes the folder this key's, or finds that it is.

    Raises:
        TrainingError: it is another's, or its key cannot be read.
    """
    wanted = json.loads(json.dumps({"schema": _SCHEMA, **key}))
    path = folder / _KEY
    if path.is_file():
        try:
            found = parse_json(read_small(path))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise TrainingError(f"{path}: is damaged. Delete {folder}, or give --feature-cache-dir another folder.")
        if found != wanted:
            other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise TrainingError(
                f"{folder}: holds the feature cache of another run ({', '.join(other)} differ). Give "
                "--feature-cache-dir another folder, or delete this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise TrainingError(f"{folder}: is no feature cache, and not empty. Give --feature-cache-dir another folder.")
    with write_whole(path) as beside:
        beside.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
