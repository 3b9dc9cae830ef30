"""Exported files under construction: written in a temporary folder, renamed when whole and right, or set aside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from litdeploy.errors import BundleError
from litdeploy.files import remove, remove_partial, sync_folder, write_text
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact

# What an unfinished file's folder is called.
_PARTIAL = ".partial-"


def tidy(folder: Path) -> None:
    """Remove what killed exports left. Call it under the bundle's lock, when no other process writes."""
    remove_partial(folder)
    for path in folder.glob(f"{_PARTIAL}*"):
        remove(path)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder next to it.

    Raises:
        BundleError: the block cannot write: no space left, or no permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=_PARTIAL) as folder:
            yield Path(folder) / path.name
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror or error}). The earlier file is unchanged. Make room, or "
            "copy the bundle to another disk, and export again."
        ) from error


def keep(candidate: Path, path: Path, artefact: Artefact) -> None:
    """Give a file and its sidecar their final names, and remove an earlier rejected file."""
    write_sidecar(candidate, artefact)
    for source, target in ((candidate, path), (sidecar_of(candidate), sidecar_of(path))):
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.replace(target)
    sync_folder(path.parent)
    for leftover in (rejected_path(path), sidecar_of(rejected_path(path))):
        remove(leftover)


def reject(candidate: Path, path: Path, artefact: Artefact) -> Path:
    """Keep a file that failed under a name that is no artefact's, and return its path."""
    kept = rejected_path(path)
    candidate.replace(kept)
    write_sidecar(kept, artefact.model_copy(update={"path": f"{artefact.path}.rejected"}))
    return kept


def rejected_path(path: Path) -> Path:
    """Path of a rejected file."""
    return path.with_name(f"{path.name}.rejected")


def write_sidecar(path: Path, artefact: Artefact) -> None:
    """Write a file's sidecar."""
    write_text(sidecar_of(path), artefact.model_dump_json(indent=2) + "\n")
