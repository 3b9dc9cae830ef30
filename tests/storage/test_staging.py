from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import BundleError
from litdeploy.storage.records import Artefact
from litdeploy.storage.staging import keep, reject, rejected_path, sidecar_of, staged, write_sidecar

ARTEFACT = Artefact(path="export/student.onnx", sha256="0" * 64, precision="fp32", versions={}, details={"bytes": 3})


def written(path: Path, content: bytes) -> None:
    with staged(path) as candidate:
        assert candidate.name == path.name
        candidate.write_bytes(content)
        write_sidecar(candidate, ARTEFACT)
        keep(candidate, path, ARTEFACT)


def test_a_file_appears_with_its_sidecar_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "export" / "student.onnx"
    for content in (b"old", b"new"):
        written(path, content)
        assert path.read_bytes() == content
        assert sorted(path.parent.iterdir()) == [path, sidecar_of(path)]
    assert Artefact.model_validate_json(sidecar_of(path).read_bytes()) == ARTEFACT


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("any")])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "student.onnx"
    written(path, b"old")
    kind = BundleError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with staged(path) as candidate:
            candidate.write_bytes(b"half of the n")
            raise error

    with pytest.raises(kind) as caught:
        fail()
    if isinstance(error, OSError):
        assert "student.onnx: cannot be written (No space left on device)" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, sidecar_of(path)]


def test_a_rejected_file_is_kept_until_one_is_right(tmp_path: Path) -> None:
    path = tmp_path / "export" / "student.onnx"
    written(path, b"old")
    with staged(path) as candidate:
        candidate.write_bytes(b"wrong")
        kept = reject(candidate, path, ARTEFACT)
    assert kept == rejected_path(path)
    assert kept.read_bytes() == b"wrong"
    assert path.read_bytes() == b"old"
    found = Artefact.model_validate_json(sidecar_of(kept).read_bytes())
    assert found.path == "export/student.onnx.rejected"
    written(path, b"right")
    assert sorted(path.parent.iterdir()) == [path, sidecar_of(path)]
