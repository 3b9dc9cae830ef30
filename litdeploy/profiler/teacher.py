"""A bundle's teacher: found, held against its hash, loaded, and brought into the form that the student ships in."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from litdeploy.bundle import Bundle, Manifest, Record, sha256_of, write_whole
from litdeploy.errors import BundleError
from litdeploy.exporter import export_onnx
from litdeploy.networks import Network, NetworkName, describe, load
from litdeploy.networks.registry import is_code
from litdeploy.profiler.environment import versions
from litdeploy.spec import InputSpec


class _Sidecar(Record):
    """What an exported teacher was made from; a file is used again only where all of it still holds."""

    teacher_sha256: str
    versions: dict[str, str]
    opset: int
    sha256: str


def load_teacher(bundle: Bundle, manifest: Manifest, path: str | Path | None, network: NetworkName | None) -> Network:
    """Loads the very file that the student was made from.

    Args:
        path: where it is now; None: where it was then.
        network: needed where the teacher is code of the user's.

    Raises:
        BundleError: the file is not there, or is another one.
    """
    record = manifest.teacher
    found = Path(path if path is not None else record.path)
    if not found.is_file():
        raise BundleError(
            f"{found}: no such file; it is where {bundle.path}'s teacher "
            + ("was said to be." if path is not None else "was when the student was trained.")
            + f" Say where it is now: litdeploy profile {bundle.path} --teacher FILE"
        )
    digest = sha256_of(found)
    if digest != record.sha256:
        raise BundleError(
            f"{found}: not the teacher that {bundle.path} was made from (SHA-256 {digest[:12]}…, the manifest says "
            f"{record.sha256[:12]}…). Say where that one is: litdeploy profile {bundle.path} --teacher FILE"
        )
    spec = record.spec
    return load(
        found,
        network=network if is_code(spec.name) else describe(spec.name, spec.arguments),
        normalise=_as_text(spec.input),
        input_shape=spec.input.shape,
    )


def _as_text(spec: InputSpec) -> str:
    """The normalisation as `load` takes it."""
    return ":".join(",".join(repr(value) for value in values) for values in (spec.mean, spec.std))


def teacher_onnx(bundle: Bundle, teacher: Network, teacher_sha256: str, opset: int) -> Path:
    """The teacher as ONNX in the bundle's `profile/`, exported as the student is; made once.

    Args:
        opset: the student's, so that both sides run the same operators.

    Raises:
        NetworkError, SettingsError: it cannot be exported so.
    """
    path = bundle.profile_path / "teacher.onnx"
    sidecar = path.with_suffix(".json")
    wanted = {"teacher_sha256": teacher_sha256, "versions": versions(), "opset": opset}
    if path.is_file() and sidecar.is_file():
        try:
            stored = _Sidecar.model_validate_json(sidecar.read_bytes())
        except ValidationError:
            stored = None  # torn, or of another version: as good as none
        if stored and stored.model_dump() == {**wanted, "sha256": sha256_of(path)}:
            return path
    export_onnx(teacher, path, opset)
    with write_whole(sidecar) as temporary:
        temporary.write_text(json.dumps({**wanted, "sha256": sha256_of(path)}, indent=2) + "\n", encoding="utf-8")
    return path
