"""Exported files on their way: written beside, taken under their names when they are whole and right, or set aside."""

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
    """Removes what exports that were killed had begun. Under the bundle's lock only: nobody is writing then."""
    remove_partial(folder)
    for path in folder.glob(f"{_PARTIAL}*"):
        remove(path)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own beside, which is gone afterwards.

    Raises:
        BundleError: what is done inside cannot write: no space left, or no right to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=_PARTIAL) as folder:
            yield Path(folder) / path.name
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror or error}). What was there before is as it was. Make room, or "
            "copy the bundle to another disk, and export again."
        ) from error


def keep(candidate: Path, path: Path, artefact: Artefact) -> None:
    """Gives a file and its sidecar their final names, and clears away what was rejected before."""
    write_sidecar(candidate, artefact)
    for source, target in ((candidate, path), (sidecar_of(candidate), sidecar_of(path))):
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.replace(target)
    sync_folder(path.parent)
    for leftover in (rejected_path(path), sidecar_of(rejected_path(path))):
        remove(leftover)


def reject(candidate: Path, path: Path, artefact: Artefact) -> Path:
    """Keeps a file that failed, under a name that nothing takes for an artefact, and tells that name."""
    kept = rejected_path(path)
    candidate.replace(kept)
    write_sidecar(kept, artefact.model_copy(update={"path": f"{path.parent.name}/{kept.name}"}))
    return kept


def rejected_path(path: Path) -> Path:
    """Where a rejected file is kept."""
    return path.with_name(f"{path.name}.rejected")


def write_sidecar(path: Path, artefact: Artefact) -> None:
    """Writes what is known of a file beside it."""
    write_text(sidecar_of(path), artefact.model_dump_json(indent=2) + "\n")
