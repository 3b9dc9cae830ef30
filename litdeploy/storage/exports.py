"""A folder with the exported files of a network that was not compressed.

.litdeploy             marks the folder as made by litdeploy; written first
exports.json           the network, and the files with their hashes; written last
network.safetensors    weights, if the network came from no file
transformers/          the configuration of a transformers network; with tokens as input, its tokenizer
network.onnx, …        the files, each with a sidecar NAME.json
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from litdeploy.errors import BundleError
from litdeploy.files import is_file, read_small
from litdeploy.storage.folder import EXPORTS, TRANSFORMERS, Folder
from litdeploy.storage.records import SCHEMA_VERSION, Exports

DEFAULT_EXPORTS = Path("exported")


class ExportFolder(Folder[Exports]):
    """The folder of one network's exported files."""

    kind = "exports"
    role = "network"
    manifest_keys = frozenset({"litdeploy", "network", "artefacts"})

    @property
    def manifest_path(self) -> Path:
        return self.path / EXPORTS

    @property
    def export_path(self) -> Path:
        return self.path

    @property
    def weights_path(self) -> Path:
        return self.path / "network.safetensors"

    def read(self) -> Exports:
        """Read the manifest. See `Folder.read`."""
        self._check_links()
        try:
            manifest = Exports.model_validate_json(read_small(self.manifest_path))
        except (OSError, ValidationError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise BundleError(
                f"{self.manifest_path}: not a list of exported files that this version reads ({first}). Export them "
                "again, to another folder: litdeploy export teacher.pt --onnx --out FOLDER"
            ) from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise BundleError(
                f"{self.manifest_path}: schema version {manifest.schema_version}; this one reads {SCHEMA_VERSION}."
            )
        return manifest

    def claim(self, manifest: Exports) -> None:
        """Make the folder ready for files of a network; those that it already has of this network are kept.

        Raises:
            BundleError: it has files of another network.
        """
        if is_file(self.manifest_path):
            earlier = self.read()
            if earlier.network.sha256 != manifest.network.sha256:
                raise BundleError(
                    f"{self.path}: holds exported files of another network ({earlier.network.path}); they are kept. "
                    "Choose another folder with --out."
                )
            manifest = manifest.model_copy(update={"artefacts": earlier.artefacts})
        self._mark()
        self.write(manifest)

    def _entries(self) -> list[Path]:
        files = list(self.path.glob("network.*")) if self.path.is_dir() else []
        return [self.manifest_path, self.path / TRANSFORMERS, *files]
