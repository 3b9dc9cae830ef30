from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.errors import BundleError
from litdeploy.files import sha256_of, write_whole
from litdeploy.networks.families.resnet import resnet
from litdeploy.storage.bundle import CONFIG, TOKENIZER, Bundle, carried_by, read_sidecar, sidecar_of
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import Artefact, DataRecord, Manifest, RunRecord, TeacherRecord

SPEC = NetworkSpec(
    name="resnet",
    arguments={"depth": 8, "in_channels": 1},
    input=InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,)),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    bundle = Bundle(tmp_path / "deploy")
    bundle.claim(overwrite=False)
    sha256 = write_checkpoint(bundle.student_path, resnet(8, in_channels=1).state_dict(), SPEC)
    bundle.write(
        Manifest(
            litdeploy="0",
            status="complete",
            teacher=TeacherRecord(path="teacher.pt", sha256="0" * 64, spec=SPEC),
            student=SPEC.with_(plan={"layer1": (0,)}),
            student_sha256=sha256,
            recipe=Recipe(),
            data=DataRecord(source="digits", fingerprint="0", images={"test": 1}),
            run=RunRecord(
                started="now", seconds=1, images_per_second=1, epochs=5, device="cpu", precision="fp32", versions={}
            ),
            metrics={},
        )
    )
    return bundle


def test_a_manifest_is_read_back_as_it_was_written(bundle: Bundle) -> None:
    manifest = bundle.read()
    bundle.write(manifest)
    assert bundle.read() == manifest


def test_what_is_no_bundle_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="litdeploy compress"):
        Bundle(tmp_path / "absent").read()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle(tmp_path).read()


def test_an_unfinished_run_is_named(bundle: Bundle) -> None:
    bundle.manifest_path.unlink()
    with pytest.raises(BundleError, match="did not finish"):
        bundle.read()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"surprise": 1}'])
def test_a_damaged_manifest_is_refused(bundle: Bundle, text: str) -> None:
    bundle.manifest_path.write_text(text)
    with pytest.raises(BundleError, match="not a manifest"):
        bundle.read()


def test_another_schema_is_refused(bundle: Bundle) -> None:
    text = bundle.manifest_path.read_text().replace('"schema_version": 1', '"schema_version": 99')
    bundle.manifest_path.write_text(text)
    with pytest.raises(BundleError, match="schema version 99"):
        bundle.read()


def test_an_altered_student_is_refused(bundle: Bundle) -> None:
    content = bytearray(bundle.student_path.read_bytes())
    content[-1] ^= 1
    bundle.student_path.write_bytes(content)
    with pytest.raises(BundleError, match="altered"):
        bundle.read()


def test_an_interrupted_run_can_be_read_but_not_gone_on_from(bundle: Bundle) -> None:
    bundle.write(bundle.read().model_copy(update={"status": "interrupted"}))
    assert bundle.read().status == "interrupted"
    with pytest.raises(BundleError, match="interrupted after 5 of 10 epochs"):
        bundle.read_complete()


def test_another_run_is_kept_unless_overwritten(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="it is kept"):
        bundle.claim(overwrite=False)
    assert bundle.read().status == "complete"
    bundle.claim(overwrite=True)
    assert not bundle.exists()


def test_a_bundle_that_was_removed_under_way_is_not_called_written(bundle: Bundle) -> None:
    manifest = bundle.read()
    shutil.rmtree(bundle.path)
    with pytest.raises(BundleError, match="removed or emptied while"):
        bundle.write(manifest)
    assert not bundle.manifest_path.exists()


def test_other_peoples_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"thesis\.tex"):
        Bundle(tmp_path).claim(overwrite=True)


def test_a_file_of_the_users_in_a_bundle_is_left_there(bundle: Bundle) -> None:
    (bundle.path / "thesis.tex").write_text("years of work")
    bundle.claim(overwrite=True)
    assert (bundle.path / "thesis.tex").read_text() == "years of work"
    assert not bundle.exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "deploy").touch()
    with pytest.raises(BundleError, match="is a file"):
        Bundle(tmp_path / "deploy").claim(overwrite=True)


def _artefact(path: str, sha256: str) -> Artefact:
    return Artefact(path=path, sha256=sha256, precision="fp32", versions={}, details={})


def test_an_artefact_is_held_against_its_hash(bundle: Bundle) -> None:
    path = bundle.export_path / "student.onnx"
    with write_whole(path) as temporary:
        temporary.write_bytes(b"onnx")
    manifest = bundle.add_artefact("onnx", _artefact("export/student.onnx", sha256_of(path)))
    assert bundle.artefact_path(manifest.artefacts["onnx"]) == path
    path.write_bytes(b"other")
    with pytest.raises(BundleError, match="altered"):
        bundle.artefact_path(manifest.artefacts["onnx"])


def test_an_artefact_outside_the_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    with pytest.raises(BundleError, match="outside"):
        bundle.artefact_path(_artefact("../outside", sha256_of(tmp_path / "outside")))


@pytest.mark.parametrize("name", ["profile", "export", "metrics.jsonl", "student.safetensors"])
def test_a_link_out_of_the_bundle_is_not_followed(bundle: Bundle, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / name).unlink(missing_ok=True)
    (bundle.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link that leaves the bundle"):
        bundle.read()


def test_a_manifest_far_too_large_is_not_read(bundle: Bundle) -> None:
    with bundle.manifest_path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(BundleError, match="larger than"):
        bundle.read()


def artefact(**changes: Any) -> Artefact:
    values = {"path": "export/a.onnx", "sha256": "0" * 64, "precision": "fp32", "versions": {}, "details": {}}
    return Artefact.model_validate({**values, **changes})


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "export/../../a", "a\0b"])
def test_an_artefact_lies_in_its_bundle(bundle: Bundle, path: str) -> None:
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.artefact_path(artefact(path=path))


def test_a_sidecar_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other.json").write_text(artefact().model_dump_json())
    sidecar_of(tmp_path / "in" / "a.onnx").symlink_to(tmp_path / "other.json")
    with pytest.raises(OSError, match="leaves its folder"):
        read_sidecar(tmp_path / "in" / "a.onnx")


def test_what_transformers_needs_appears_as_a_whole(bundle: Bundle) -> None:
    def write(folder: Path) -> None:
        assert not bundle.transformers_path.exists()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("[]")

    carried = bundle.carry(write)
    assert sorted(carried) == ["config.json", "tokenizer.json"]
    bundle.write(bundle.read().model_copy(update={"carried": carried}))
    assert carried_by(bundle.student_path, CONFIG) == bundle.transformers_path
    assert carried_by(bundle.export_path / "student.onnx", CONFIG) == bundle.transformers_path
    assert carried_by(bundle.path, TOKENIZER) is None

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match="No space left"):
        bundle.carry(fail)
    assert bundle.read().carried == carried
    assert not list(bundle.path.glob(".*partial"))
    (bundle.transformers_path / "config.json").write_text("{ }")
    with pytest.raises(BundleError, match=r"config\.json: missing, or altered"):
        bundle.read()
    assert bundle.carry(lambda folder: None) == {}
    assert not bundle.transformers_path.exists()


def test_a_manifest_names_no_file_elsewhere(bundle: Bundle) -> None:
    outside = bundle.path.parent / "secret"
    outside.write_text("secret")
    carried = {"../../secret": sha256_of(outside)}
    bundle.write(bundle.read().model_copy(update={"carried": carried}))
    with pytest.raises(BundleError, match="missing, or altered"):
        bundle.read()
