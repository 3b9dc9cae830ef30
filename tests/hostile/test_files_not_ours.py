"""Files that litdeploy did not write are never removed or overwritten, whatever is typed."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import litdeploy
from litdeploy.config.recipe import DataSettings
from litdeploy.data import open_data
from litdeploy.errors import BundleError, DataError, TrainingError
from litdeploy.files import sha256_of, write_text
from litdeploy.pipeline import deploy
from litdeploy.storage.bundle import Bundle, sidecar_of
from litdeploy.storage.lock import locked
from litdeploy.storage.records import Artefact
from litdeploy.storage.staging import reject
from litdeploy.trainer import compress
from litdeploy.trainer.feature_cache import CacheFiles
from litdeploy.trainer.resume import Checkpoints, Every

QUICK = {"data": "digits", "epochs": 1, "device": "cpu", "batch_size": 64, "feature_cache": "off"}
COMMON = ("checkpoints", "features", "export", "profile", "tensorboard", "chain", "generations", "transformers")
ARTEFACT = Artefact(path="export/student.onnx", sha256="0" * 64, precision="fp32", versions={}, details={})


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=COMMON)
def project(request: pytest.FixtureRequest, tmp_path: Path, teacher_path: Path) -> Path:
    """A folder of the user's, with a folder of a name that is in bundles too, and the teacher in that one."""
    folder = tmp_path / "project"
    (folder / request.param).mkdir(parents=True)
    shutil.copy(teacher_path, folder / request.param / "best.safetensors")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("verb", ["deploy", "compress", "resume"])
def test_a_folder_is_no_bundle_by_the_names_in_it(project: Path, verb: str, overwrite: bool) -> None:
    before = tree(project)
    [teacher] = before
    run: Callable[[], object] = {
        "deploy": lambda: deploy(teacher, out=project, overwrite=overwrite, student_depth=8, **QUICK),
        "compress": lambda: compress(teacher, out=project, overwrite=overwrite, student_depth=8, **QUICK),
        "resume": lambda: compress(
            teacher, out=project, overwrite=overwrite, resume=not overwrite, student_depth=8, **QUICK
        ),
    }[verb]
    with pytest.raises(BundleError, match=r"part of the bundle|not litdeploy's") as told:
        run()
    assert "--out" in str(told.value)
    assert tree(project) == before
    with pytest.raises(BundleError, match=r"not litdeploy's"):
        Bundle(project).claim(overwrite)
    with pytest.raises(BundleError, match=r"not litdeploy's"), Bundle(project).lock():
        pass
    assert tree(project) == before


@pytest.mark.parametrize("content", ['{"name": "my app", "version": "1"}', "{", ""])
def test_a_manifest_of_something_else_makes_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"not litdeploy's \(manifest\.json\)"):
        Bundle(tmp_path).claim(overwrite=True)
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize(
    "name",
    [
        "export/notes.txt",
        "checkpoints/best.pt",
        "features/mine/a.bin",
        "profile/thesis.tex",
        "chain/8/a.txt",
        "transformers/weights.h5",
    ],
)
def test_what_the_user_put_into_a_bundle_is_listed_and_kept(tmp_path: Path, name: str) -> None:
    bundle = Bundle(tmp_path / "deploy")
    bundle.claim(overwrite=False)
    bundle.metrics_path.touch()
    (bundle.path / name).parent.mkdir(parents=True)
    (bundle.path / name).write_text("years of work")
    with pytest.raises(BundleError, match=r"did not write .*(" + name + "|chain/8|features/mine)"):
        bundle.claim(overwrite=True)
    assert (bundle.path / name).read_text() == "years of work"
    assert bundle.metrics_path.is_file()


def test_a_bundle_of_the_version_before_has_no_marker_and_is_one(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.manifest_path.write_text('{"litdeploy": "0.1.0", "student_sha256": "0"}')
    with pytest.raises(BundleError, match="it is kept"):
        bundle.claim(overwrite=False)
    bundle.claim(overwrite=True)
    assert not bundle.exists()


def test_a_bundle_in_a_chain_is_removed_with_it(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "deploy")
    bundle.claim(overwrite=False)
    inner = bundle.in_chain(8)
    with inner.lock():
        inner.claim(overwrite=False)
        inner.metrics_path.touch()
    bundle.claim(overwrite=True)
    assert not bundle.chain_path.exists()


def test_checkpoints_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "new.checkpoints").mkdir()
    (tmp_path / "new.checkpoints" / "best.pt").write_text("years of work")
    Checkpoints(tmp_path / "new.checkpoints", {}, Every(), print).clear()
    assert (tmp_path / "new.checkpoints" / "best.pt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_does_not_replace_its_own_input(tmp_path: Path, teacher_path: Path, overwrite: bool) -> None:
    bundle = Bundle(tmp_path / "deploy")
    bundle.claim(overwrite=False)
    shutil.copy(teacher_path, bundle.student_path)
    with pytest.raises(BundleError, match="which this run would replace"):
        compress(bundle.student_path, out=bundle.path, overwrite=overwrite, student_depth=8, **QUICK)
    assert sha256_of(bundle.student_path) == sha256_of(teacher_path)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    return path


@pytest.mark.parametrize("name", [".lock.json", ".lock", ".litdeploy", ".lock.json.{pid}.partial"])
def test_a_link_in_a_strangers_bundle_is_not_written_through(tmp_path: Path, victim: Path, name: str) -> None:
    bundle = Bundle(tmp_path / "deploy")
    bundle.path.mkdir()
    bundle.manifest_path.write_text('{"litdeploy": "0.1.0", "student_sha256": "0"}')
    (bundle.path / name.format(pid=os.getpid())).symlink_to(victim)
    with suppress(BundleError), bundle.lock():
        bundle.claim(overwrite=True)
    assert victim.read_text() == "years of work"


def test_a_lock_is_no_link_even_to_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "absent")
    with pytest.raises(BundleError, match="is a link"), locked(tmp_path / ".lock", "it", "go away"):
        pass
    assert not (tmp_path / "absent").exists()


def test_the_sidecar_of_a_rejected_file_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "export" / "student.onnx"
    path.parent.mkdir()
    path.write_bytes(b"onnx")
    sidecar_of(path.with_name("student.onnx.rejected")).symlink_to(victim)
    kept = reject(path, path, ARTEFACT)
    assert victim.read_text() == "years of work"
    assert not sidecar_of(kept).is_symlink()


def test_a_cache_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    size = victim.stat().st_size
    files = CacheFiles(tmp_path / "features", {"a": 1})
    (tmp_path / "features" / "layer1.bin").symlink_to(victim)
    with pytest.raises(TrainingError, match="is a link"):
        files.tensor("layer1", (size,), torch.uint8)


def test_writing_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "a.json").symlink_to(victim)
    write_text(tmp_path / "a.json", "{}")
    assert victim.read_text() == "years of work"
    assert (tmp_path / "a.json").read_text() == "{}"


# Files that write otherwise too: into a temporary folder, into one that appears by a rename, or into a file that
# `write_whole` has just made.
_OTHER_WRITES = {
    "files.py",
    "exporter/triton_repository.py",
    "profiler/measure/memory_meter.py",
    "profiler/measure/processes.py",
    "trainer/progress.py",
}


def test_there_is_one_function_that_writes_files() -> None:
    root = Path(litdeploy.__file__).parent
    found = [
        f"{file.relative_to(root)}:{line}"
        for file in sorted(root.rglob("*.py"))
        if file.relative_to(root).as_posix() not in _OTHER_WRITES
        for line in _writes(ast.parse(file.read_text()))
    ]
    assert not found, "these write without `write_whole`: " + ", ".join(found)


def _writes(node: ast.AST) -> Iterator[int]:
    """Lines with a call that writes a file and is not inside a `with write_whole(…)`."""
    if isinstance(node, ast.With) and any("write_whole" in ast.unparse(item.context_expr) for item in node.items):
        return
    if isinstance(node, ast.Call) and _opens_for_writing(node):
        yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _writes(child)


def _opens_for_writing(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        modes = [str(each.value) for each in call.args if isinstance(each, ast.Constant)]
        modes += [str(each.value.value) for each in call.keywords if isinstance(each.value, ast.Constant)]
        return any(set("wax") & set(mode) and set(mode) <= set("wabtx+") for mode in modes)
    return name in ("write_bytes", "save_file") or (name == "write_text" and isinstance(call.func, ast.Attribute))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_image_that_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            Image.new("L", (8, 8), index).save(tmp_path / "images" / label / f"{index}.png")
    endless = tmp_path / "images" / "cat" / "9.png"
    if kind == "pipe":
        os.mkfifo(endless)
    else:
        endless.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"9\.png: is a pipe, a device"):
        open_data(DataSettings(source=str(tmp_path / "images")), torch.device("cpu"), 0).record()
