"""A bundle's teacher, or the network whose exported files a folder holds: found, checked against its hash, loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from litdeploy.config.spec import TaskName
from litdeploy.errors import BundleError
from litdeploy.files import is_file, sha256_of
from litdeploy.networks import Network, NetworkName, describe, load, published
from litdeploy.networks.registry import check_stored, is_code, request
from litdeploy.storage.bundle import CONFIG, Bundle, carried_by
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.exports import ExportFolder
from litdeploy.storage.records import Manifest, TeacherRecord


def load_teacher(bundle: Bundle, manifest: Manifest, path: str | Path | None, network: NetworkName | None) -> Network:
    """Load the file that the student was made from.

    Args:
        path: where it is now, or the folder that transformers saved it in; None: where it was at training.
        network: needed if the teacher is the user's code.

    Raises:
        BundleError: the file is missing, or is another one.
    """
    return _load(bundle, manifest.teacher, path, network, ("teacher", "when the student was trained", "--teacher"))


def load_exported(folder: ExportFolder, path: str | Path | None, network: NetworkName | None) -> Network:
    """Load the network that the files in a folder were exported from; arguments and errors as of `load_teacher`."""
    return _load(folder, folder.read().network, path, network, ("network", "when it was exported", "--against"))


def _load(
    folder: Bundle | ExportFolder,
    record: TeacherRecord,
    path: str | Path | None,
    network: NetworkName | None,
    words: tuple[str, str, str],
) -> Network:
    role, before, option = words
    found, _ = published(path if path is not None else record.path)
    if not is_file(found):
        raise BundleError(
            f"{found}: no such file; it is the path of {folder.path}'s {role} "
            + ("that was given." if path is not None else f"{before}.")
            + f" Say where it is now: {option} FILE"
        )
    digest = sha256_of(found)
    if digest != record.sha256:
        made = "was made from" if role == "teacher" else "was exported from"
        raise BundleError(
            f"{found}: not the {role} that {folder.path} {made} (SHA-256 {digest[:12]}…, the manifest says "
            f"{record.sha256[:12]}…). Say where that one is: {option} FILE"
        )
    spec = record.spec
    requested = None if network is None else request(network)
    check_stored(spec.name, spec.arguments, requested, str(folder.manifest_path))
    return load(
        found,
        network=network if is_code(spec.name) else describe(spec.name, spec.arguments),
        input=spec.input,
        task=spec.task_name,
        folder=carried_by(folder.path, CONFIG),
    )


def read_network(
    source: str | Path | nn.Module | Network,
    network: NetworkName | None,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    task: TaskName | None,
) -> tuple[Network, TeacherRecord | None]:
    """Load a network that nobody compressed, with its record; one in memory has none yet. Arguments as of `load`."""
    if isinstance(source, Network):
        return source, None
    if isinstance(source, nn.Module):
        return load(source, normalise=normalise, input_shape=input_shape, task=task), None
    path, network = published(source, network)
    checkpoint = read_checkpoint(path)
    loaded = load(checkpoint, network=network, normalise=normalise, input_shape=input_shape, task=task)
    return loaded, TeacherRecord(path=str(path.resolve()), sha256=checkpoint.sha256, spec=loaded.spec)
