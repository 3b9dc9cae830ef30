"""A folder that litdeploy writes: how it is marked and locked, and the exported files that its manifest names."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from litdeploy.errors import BundleError
from litdeploy.files import (
    is_file,
    is_inside,
    is_partial,
    parse_json,
    read_small,
    remove,
    remove_partial,
    sha256_of,
    sync_folder,
    write_text,
)
from litdeploy.storage.lock import locked
from litdeploy.storage.records import SCHEMA_VERSION, Artefact, Exports, Manifest
from litdeploy.version import __version__

# The files by which transformers finds a network and a tokenizer.
TRANSFORMERS = "transformers"
MARKER = ".litdeploy"
# The manifest of a folder that holds exported files and no student.
EXPORTS = "exports.json"
# Never removed: a lock that is held, and a teacher that may be the input of the next run.
KEPT = (".lock", ".lock.json", "teacher.safetensors")

M = TypeVar("M", Manifest, Exports)


class Folder(ABC, Generic[M]):
    """A folder of litdeploy's and its manifest. Paths are properties; only methods read files.

    Attributes:
        kind: what the marker calls it.
        role: what its network is called, in messages and in the names of exported files.
        manifest_keys: keys of its manifest, by which a folder without a marker is recognized.
    """

    kind: ClassVar[str]
    role: ClassVar[str]
    manifest_keys: ClassVar[frozenset[str]]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    @abstractmethod
    def manifest_path(self) -> Path: ...

    @property
    @abstractmethod
    def export_path(self) -> Path:
        """The folder of the exported files."""

    @property
    def transformers_path(self) -> Path:
        return self.path / TRANSFORMERS

    @abstractmethod
    def read(self) -> M:
        """Read the manifest.

        Raises:
            BundleError: there is none, or it cannot be read.
        """

    def write(self, manifest: M) -> None:
        """Write the manifest, after every file that it names.

        Raises:
            BundleError: it cannot be written, or the folder was removed meanwhile, and the files that it names with it.
        """
        if not self._is_ours():
            raise BundleError(
                f"{self.path}: was removed or emptied while this command wrote to it. What it wrote since then is "
                "there, without a manifest. Run the command again."
            )
        write_text(self.manifest_path, manifest.model_dump_json(indent=2) + "\n")

    def add_artefact(self, kind: str, artefact: Artefact) -> M:
        """Add an exported file to the manifest and return the new manifest."""
        manifest = self.read()
        manifest = manifest.model_copy(update={"artefacts": {**manifest.artefacts, kind: artefact}})
        self.write(manifest)
        return manifest

    def drop_artefact(self, kind: str) -> None:
        """Remove an exported file from the manifest, if it is listed; the caller handles the file itself."""
        manifest = self.read()
        if kind not in manifest.artefacts:
            return
        left = {name: artefact for name, artefact in manifest.artefacts.items() if name != kind}
        self.write(manifest.model_copy(update={"artefacts": left}))

    def artefact_path(self, artefact: Artefact) -> Path:
        """The path of an exported file whose hash was checked.

        Raises:
            BundleError: the file is missing, was altered, or is outside the folder.
        """
        path = self.path / artefact.path
        if not is_inside(path, self.path):
            raise BundleError(f"{self.manifest_path}: names {artefact.path!r}, which is outside the {self.kind}.")
        if not is_file(path) or sha256_of(path) != artefact.sha256:
            raise BundleError(
                f"{path}: missing, or altered since it was exported (its SHA-256 differs). Export it again."
            )
        return path

    def carry(self, write: Callable[[Path], None]) -> dict[str, str]:
        """Replace the files for transformers, the whole folder at once.

        Args:
            write: writes files into an existing folder; none if the network needs none.

        Returns:
            Name → SHA-256 of each file.

        Raises:
            BundleError: they cannot be written.
        """
        temporary = self.path / f".{TRANSFORMERS}.{os.getpid()}.partial"
        remove(temporary)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            written = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            for path in temporary.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            remove(self.transformers_path)
            if written:
                temporary.replace(self.transformers_path)
                sync_folder(self.path)
        except OSError as error:
            raise BundleError(
                f"{self.transformers_path}: cannot be written ({error.strerror or error}). Make room there, or choose "
                "another folder with --out."
            ) from error
        finally:
            remove(temporary)
        return written

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other processes from writing here; the folder is made if it is missing.

        Raises:
            BundleError: another process is at work here, the folder cannot be written, or it holds other files.
        """
        self._check_ours()
        self._make()
        with locked(self.path / ".lock", str(self.path), "choose another folder with --out"):
            self.tidy()
            if self._is_ours() and not is_file(self.path / MARKER):  # of a version that wrote no marker
                self._mark()
            yield

    def tidy(self) -> None:
        """Remove unfinished files of killed processes. Call this under the lock: then no process is writing."""
        remove_partial(self.path)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"{self.path}: the folder cannot be made ({error.strerror}).") from None

    def _mark(self) -> None:
        write_text(self.path / MARKER, f'{{"{self.kind}": {SCHEMA_VERSION}, "litdeploy": "{__version__}"}}\n')

    def _is_ours(self) -> bool:
        """Whether litdeploy made this folder: by its marker, or by the manifest of a version that wrote no marker.

        Folders named `checkpoints` or `export` say nothing: any project has them.
        """
        for path, keys in ((self.path / MARKER, {self.kind}), (self.manifest_path, self.manifest_keys)):
            try:
                found = None if path.is_symlink() else parse_json(read_small(path))
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and keys <= found.keys():
                return True
        return False

    def _check_ours(self) -> None:
        """Check that the folder is of this kind, empty, or absent."""
        if self._is_ours():
            self._check_links()
        elif self.path.is_dir():
            foreign = sorted(
                path.name for path in self.path.iterdir() if path.name not in KEPT and not _is_first(path.name)
            )
            if foreign:
                raise BundleError(
                    f"{self.path}: holds files that are not litdeploy's ({', '.join(foreign[:3])}). "
                    "Choose another folder with --out."
                )
        elif self.path.exists():
            raise BundleError(f"{self.path}: is a file; --out names a folder.")

    def _check_links(self) -> None:
        """Check that no link leaves the folder: a stranger may have packed one, and files would be written through it.

        Raises:
            BundleError: a link does.
        """
        for path in (self.path / MARKER, *self._entries()):
            if not is_inside(path, self.path):
                raise BundleError(
                    f"{path}: is a link that leaves the {self.kind}. Put the file or folder itself there."
                )

    @abstractmethod
    def _entries(self) -> list[Path]:
        """Everything that litdeploy may write into the folder, next to its marker."""


def _is_first(name: str) -> bool:
    """Whether a file is one that a process was writing when it was killed before its folder had a marker."""
    return is_partial(name) and name[1:].rsplit(".", 2)[0] in (MARKER, *KEPT)
