"""A bundle's teacher: found, checked against its hash, and loaded."""

from __future__ import annotations

from pathlib import Path

from litdeploy.errors import BundleError
from litdeploy.files import is_file, sha256_of
from litdeploy.networks import Network, NetworkName, describe, load, published
from litdeploy.networks.registry import check_stored, is_code, request
from litdeploy.storage.bundle import CONFIG, Bundle, carried_by
from litdeploy.storage.records import Manifest


def load_teacher(bundle: Bundle, manifest: Manifest, path: str | Path | None, network: NetworkName | None) -> Network:
    """Load the file that the student was made from.

    Args:
        path: where it is now, or the folder that transformers saved it in; None: where it was at training.
        network: needed if the teacher is the user's code.

    Raises:
        BundleError: the file is missing, or is another one.
    """
    record = manifest.teacher
    found, _ = published(path if path is not None else record.path)
    if not is_file(found):
        raise BundleError(
            f"{found}: no such file; it is the path of {bundle.path}'s teacher "
            + ("that was given." if path is not None else "when the student was trained.")
            + " Say where it is now: --teacher FILE"
        )
    digest = sha256_of(found)
    if digest != record.sha256:
        raise BundleError(
            f"{found}: not the teacher that {bundle.path} was made from (SHA-256 {digest[:12]}…, the manifest says "
            f"{record.sha256[:12]}…). Say where that one is: --teacher FILE"
        )
    spec = record.spec
    requested = None if network is None else request(network)
    check_stored(spec.name, spec.arguments, requested, str(bundle.manifest_path))
    return load(
        found,
        network=network if is_code(spec.name) else describe(spec.name, spec.arguments),
        input=spec.input,
        folder=carried_by(bundle.path, CONFIG),
    )
