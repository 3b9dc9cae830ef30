"""The folder `deploy/`: what is in it, its manifest with hashes, and the rules by which it is claimed and removed.

.litdeploy             marks the folder as made by litdeploy; written first
manifest.json          what the folder holds; written last
student.safetensors    weights; the header's metadata rebuilds the network without the manifest
transformers/          the configuration of a transformers network; with tokens as input, its tokenizer
metrics.jsonl          one line per epoch, before them one for the cut alone
checkpoints/           of an unfinished run, to resume from
features/              of an unfinished run, the teacher's features
samples.png            of a generator: images in every domain, the teacher's above the student's
generations/           born-again: the networks that taught the next one, by number
chain/                 of a chain: a bundle for each student that taught the next one, by depth
export/                artefacts, each with a sidecar NAME.json
profile/               report.json, report.html, samples.json
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from pydantic import ValidationError

from litdeploy.errors import BundleError
from litdeploy.files import is_file, is_inside, is_partial, read_small, remove, remove_matching, sha256_of
from litdeploy.storage.folder import EXPORTS, KEPT, MARKER, TRANSFORMERS, Folder
from litdeploy.storage.records import SCHEMA_VERSION, Artefact, Manifest

DEFAULT_PATH = Path("deploy")
SAMPLES = "samples.png"
# Files by which transformers finds a network and a tokenizer.
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
# Everything that litdeploy writes into a bundle: files, and folders with the names of the files in them. A claim
# removes these and nothing else.
_FILES = ("manifest.json", "student.safetensors", "metrics.jsonl", SAMPLES)
_FOLDERS: dict[str, tuple[str, ...]] = {
    TRANSFORMERS: ("*.json", "*.txt", "*.model", "*.jinja", "*.bpe", "*.tiktoken"),
    "tensorboard": ("events.out.tfevents.*",),
    "checkpoints": ("epoch-*-step-*.safetensors",),
    "features": ("key.json", "*.bin"),
    "generations": ("[0-9]*.safetensors",),
    "chain": (),  # bundles
    "export": ("student.*", ".partial-*"),
    "profile": ("report.*", "samples.json", "teacher.*", ".partial-*"),
}
_OURS = (*_FILES, *_FOLDERS)


class Bundle(Folder[Manifest]):
    """A folder with a student and everything made from it."""

    kind = "bundle"
    role = "student"
    manifest_keys = frozenset({"litdeploy", "student_sha256"})

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def student_path(self) -> Path:
        return self.path / "student.safetensors"

    @property
    def teacher_path(self) -> Path:
        return self.path / "teacher.safetensors"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.path / SAMPLES

    @property
    def export_path(self) -> Path:
        return self.path / "export"

    @property
    def profile_path(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def chain_path(self) -> Path:
        return self.path / "chain"

    def in_chain(self, depth: int) -> Bundle:
        """The bundle of the student of this depth, in a chain that ends with this bundle."""
        return Bundle(self.chain_path / str(depth))

    def exists(self) -> bool:
        """Whether the folder holds anything of a run, complete or not."""
        return self._is_ours() and any((self.path / name).exists() for name in _OURS)

    def read(self) -> Manifest:
        """Read the manifest, and check the student's file against its hash.

        Raises:
            BundleError: not a bundle, another schema, an unreadable manifest, or an altered student.
        """
        if not self.path.exists():
            raise BundleError(
                f"{self.path}: no such folder. Make a bundle first: litdeploy compress teacher.pt --student-depth 20"
                + ("" if self.path == DEFAULT_PATH else f" --out {self.path}")
            )
        if not is_file(self.manifest_path):
            if is_file(self.path / EXPORTS):
                raise BundleError(
                    f"{self.path}: holds exported files of a network that was not compressed, and no student. "
                    f"`litdeploy verify {self.path}` checks them; other commands take one of the files."
                )
            unfinished = "holds a run that did not finish" if self.exists() else "is not a bundle"
            raise BundleError(
                f"{self.path}: {unfinished} (there is no manifest.json). Run `litdeploy compress … --out {self.path}"
                f"{' --resume' if self.exists() else ''}`."
            )
        self._check_links()
        try:
            manifest = Manifest.model_validate_json(read_small(self.manifest_path))
        except OSError as error:
            raise BundleError(f"{self.manifest_path}: cannot be read ({error.strerror}).") from None
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(key) for key in first["loc"])
            raise BundleError(
                f"{self.manifest_path}: not a manifest that this version reads ({at}: {first['msg']}). "
                "Compress again with --overwrite."
            ) from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise BundleError(
                f"{self.manifest_path}: schema version {manifest.schema_version}; this one reads {SCHEMA_VERSION}."
            )
        if not is_file(self.student_path) or sha256_of(self.student_path) != manifest.student_sha256:
            raise BundleError(
                f"{self.student_path}: missing, or altered since the manifest was written (its SHA-256 differs). "
                "Restore it, or compress again with --overwrite."
            )
        for name, sha256 in manifest.carried.items():
            path = self.transformers_path / name
            if not is_inside(path, self.transformers_path) or not is_file(path) or sha256_of(path) != sha256:
                raise BundleError(
                    f"{path}: missing, or altered since the manifest was written (its SHA-256 differs). The student "
                    "needs it. Restore it, or compress again with --overwrite."
                )
        return manifest

    def _entries(self) -> list[Path]:
        chain = sorted(self.chain_path.iterdir()) if self.chain_path.is_dir() else []
        return [*(self.path / name for name in _OURS), *chain]

    def read_complete(self) -> Manifest:
        """Read the manifest of a completed training, for the stages after it.

        Raises:
            BundleError: as `read`, and if the training was interrupted.
        """
        manifest = self.read()
        if manifest.status == "interrupted":
            raise BundleError(
                f"{self.path}: its training was interrupted after {manifest.run.epochs} of {manifest.recipe.epochs} "
                "epochs. Resume it: the same `litdeploy compress …` with --resume. Its weights so far can be "
                f"measured: `litdeploy evaluate {self.student_path}`."
            )
        return manifest

    def claim(self, overwrite: bool, keep: str | None = None) -> None:
        """Make the folder ready for a new run: remove the previous run if `overwrite`, and mark the folder.

        Args:
            keep: the name of a folder that already belongs to the new run.

        Raises:
            BundleError: the folder holds another run and `overwrite` is False, or removing it would remove files that
                litdeploy did not write.
        """
        self._check_ours()
        if self.exists() and not overwrite:
            raise BundleError(
                f"{self.path}: holds a run that is not finished; it is kept. Resume it: the same command with "
                "--resume. Or choose another folder with --out, or --overwrite it."
                if self.unfinished()
                else f"{self.path}: holds another run; it is kept. Choose another folder with --out, or --overwrite it."
            )
        names = [name for name in _OURS if name != keep]
        foreign = [path for name in names for path in self._foreign(name)]
        if foreign:
            raise BundleError(
                f"{self.path}: holds files that litdeploy did not write and would have to remove "
                f"({', '.join(str(path.relative_to(self.path)) for path in foreign[:3])}). Move them elsewhere, or "
                "choose another folder with --out."
            )
        self._make()
        # First, so that a run that is killed from here on finds its folder again.
        self._mark()
        for name in names:
            remove(self.path / name)
        self.tidy()

    def check_inputs(self, inputs: Iterable[str | Path | None]) -> None:
        """Refuse inputs of a run that are in the part of this folder which the run replaces.

        Args:
            inputs: paths, or names that may be paths; None is skipped.

        Raises:
            BundleError: an input is there.
        """
        for given in inputs:
            if given is not None and any(is_inside(Path(given), self.path / name) for name in _OURS):
                raise BundleError(
                    f"{given}: is part of the bundle {self.path}, which this run would replace. Choose another folder "
                    "with --out, or copy the file elsewhere first."
                )

    def unfinished(self) -> bool:
        """Whether the folder holds a run that did not end: it was killed, or interrupted by the user."""
        if not self.manifest_path.is_file():
            return self.exists()
        if self.checkpoints_path.is_dir():
            return True
        try:
            return self.read().status == "interrupted"
        except BundleError:
            return False

    def _foreign(self, name: str) -> list[Path]:
        """Files below an entry of this folder that litdeploy did not write."""
        path = self.path / name
        if path.is_symlink() or (path.exists() and path.is_dir() != (name in _FOLDERS)):
            return [path]
        if not path.is_dir():
            return []
        if name == "chain":
            return [found for entry in sorted(path.iterdir()) for found in Bundle(entry)._foreign_anywhere()]
        return [
            found
            for found in sorted(path.iterdir())
            if (not is_partial(found.name) and not any(fnmatch(found.name, pattern) for pattern in _FOLDERS[name]))
            or (found.is_dir() and not found.name.startswith(".partial-"))
        ]

    def _foreign_anywhere(self) -> list[Path]:
        """Files in this folder that litdeploy did not write, for a folder that is removed as a whole."""
        if self.path.is_symlink() or not self._is_ours():
            return [self.path]
        known = {*_OURS, *KEPT, MARKER}
        others = [path for path in sorted(self.path.iterdir()) if path.name not in known and not is_partial(path.name)]
        return [*others, *(found for name in _OURS for found in self._foreign(name))]


def remove_files(folder: Path, kind: str) -> None:
    """Remove the files that litdeploy writes into a folder of a kind (`features`, `checkpoints`), and the folder itself
    once it is empty."""
    remove_matching(folder, _FOLDERS[kind])


def read_sidecar(path: Path) -> Artefact:
    """Read the sidecar of an exported file.

    Raises:
        OSError: it does not exist, cannot be read, or is a link that leaves its folder.
        ValidationError: it is not a sidecar.
    """
    sidecar = sidecar_of(path)
    if not is_inside(sidecar, path.parent):
        raise OSError(errno.ELOOP, "a link that leaves its folder", str(sidecar))
    return Artefact.model_validate_json(read_small(sidecar))


def sidecar_of(path: Path) -> Path:
    """The path of the sidecar of an exported file."""
    return path.with_name(f"{path.name}.json")


def carried_by(path: str | Path, name: str) -> Path | None:
    """The folder with the files for transformers, in the bundle that contains a file; None if there is no folder.

    Args:
        path: the bundle, its student's weights, or an exported file.
        name: the file to look for: `CONFIG` or `TOKENIZER`.
    """
    folders = [parent / TRANSFORMERS for parent in (Path(path), *Path(path).parents[:2])]
    return next((folder for folder in folders if is_file(folder / name)), None)
