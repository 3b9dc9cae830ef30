"""Disks that are full or read-only, memory that is short, losses and files that are wrong: a message, and a way on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from litdeploy.config.target import Target
from litdeploy.errors import BundleError, DataError, InterruptedRun, LitdeployError, TrainingError
from litdeploy.exporter import export
from litdeploy.files import write_whole
from litdeploy.networks import new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from tests.faults.conftest import QUICK, STEPS, Compress, Watching, assert_same


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """The process under a limit of the system's."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tiny: Compress, tmp_path: Path) -> None:
    def fill(done: int) -> None:
        if done == STEPS:  # files may be no larger from here on, as on a disk without space
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    with limited(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY), pytest.raises(BundleError) as told:
        tiny(tmp_path / "deploy", progress=Watching(fill), checkpoint_every="3steps")
    assert "cannot be written (File too large)" in str(told.value)
    assert "0 epochs, 3 steps" in notes(told.value)
    assert "--resume" in notes(told.value)
    found = tiny(tmp_path / "deploy", resume=True)
    assert_same(found, tiny(tmp_path / "whole"))


def test_a_full_disk_when_the_student_is_written(tiny: Compress, tmp_path: Path) -> None:
    class Late(Watching):
        def note(self, text: str) -> None:
            if text.startswith("testing"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    with (
        limited(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY),
        pytest.raises(LitdeployError, match="cannot be written") as told,
    ):
        tiny(tmp_path / "deploy", progress=Late(), checkpoint_every="1epoch")
    assert "4 epochs, 0 steps" in notes(told.value)
    again = Watching()
    tiny(tmp_path / "deploy", resume=True, progress=again)
    assert not again.images


def test_a_full_disk_under_the_features_is_told_and_kills_nobody(tiny: Compress, tmp_path: Path) -> None:
    with (
        limited(resource.RLIMIT_FSIZE, 8192),
        pytest.raises(TrainingError, match="--feature-cache-dir another folder"),
    ):
        tiny(tmp_path / "deploy", feature_cache=1, feature_cache_dir=tmp_path / "features")


def test_a_full_disk_at_the_export_leaves_nothing_half_done(tiny: Compress, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "deploy")
    target = Target(device="cpu", runners=("onnxruntime",), batch_sizes=(1,))
    with limited(resource.RLIMIT_FSIZE, 8192), pytest.raises(BundleError, match="cannot be written"):
        export(bundle, target=target)
    assert not bundle.read_complete().artefacts
    assert not list(bundle.export_path.iterdir())


# Trains with 16 MiB more address space than the process has as the first epoch begins.
SHORT = """
import json, resource, sys
from pathlib import Path
from litdeploy.errors import TrainingError
from litdeploy.trainer import Progress, compress

class Short(Progress):
    def on_train_epoch_start(self, *_):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, resource.RLIM_INFINITY))

teacher, out, given = sys.argv[1:]
try:
    compress(teacher, out=out, progress=Short(), **json.loads(given))
except TrainingError as error:
    print(error, *error.__notes__, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux")
def test_memory_that_does_not_suffice_is_told(tmp_path: Path) -> None:
    made = new("resnet14,width=4", normalise="half", input_shape=(1, 64, 64), classes=10, seed=3)
    teacher = tmp_path / "teacher.safetensors"
    write_checkpoint(teacher, made.module.state_dict(), made.spec.with_(classes=tuple("0123456789")))
    given = {**QUICK, "data": {"source": "digits", "image_size": [64, 64]}, "batch_size": 512, "method": "kd"}
    # In a process of its own: oneDNN does not recover from having had no memory for its code.
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(teacher), str(tmp_path / "deploy"), json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory on this machine" in done.stdout
    assert "--batch-size 256" in done.stdout
    assert "--resume" in done.stdout


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that may not be written to. Root may always write: it steps back."""
    if os.geteuid() != 0:
        pytest.skip("only root can make itself somebody else")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_a_read_only_folder_is_told() -> None:
    with as_nobody() as folder:
        with (
            pytest.raises(BundleError, match=r"cannot be written \(Permission denied\)"),
            write_whole(folder / "file") as at,
        ):
            at.write_text("content")
        with pytest.raises(BundleError, match="cannot be made"), Bundle(folder / "deploy").lock():
            pass
        with pytest.raises(BundleError, match=r"cannot be written \(Permission denied\)"), Bundle(folder).lock():
            pass
        assert not list(folder.iterdir())


def test_what_is_no_folder_is_told(tiny: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "deploy", Path("/proc/deploy")):
        with pytest.raises(BundleError, match="cannot be made"):
            tiny(out)


@pytest.mark.parametrize("changes", [{"method": "kd"}, {}], ids=["kd", "lit"])
def test_a_loss_that_is_no_number_stops_the_run_within_an_interval(
    changes: dict[str, Any], tiny: Compress, tmp_path: Path
) -> None:
    watching = Watching()
    wild = {"main": {"epochs": 50, "learning_rate": 1e20, "schedule": "step"}, "checkpoint_every": "1steps", **changes}
    with pytest.raises(TrainingError) as told:
        tiny(tmp_path / "deploy", progress=watching, **wild)
    assert watching.images < 16 * 20
    for text in ("epoch 1, step ", "a learning rate of about 1e+20", "--learning-rate"):
        assert text in str(told.value)
    assert ("section/layer" in str(told.value)) is not bool(changes)
    assert "--resume" in notes(told.value)
    for path in Bundle(tmp_path / "deploy").checkpoints_path.glob("*"):  # the last good ones, if there was one
        weights = load_file(path)
        assert all(weights[name].isfinite().all() for name in weights if name.startswith("student/"))


def test_a_diverging_loss_is_stopped_before_it_is_infinite(tiny: Compress, tmp_path: Path) -> None:
    wild = {"epochs": None, "main": {"epochs": 60, "learning_rate": 1e4, "schedule": "step"}, "momentum": 0.0}
    with pytest.raises(TrainingError, match=r"diverges: .* at first|is not a finite number"):
        tiny(tmp_path / "deploy", method="kd", weight_decay=0.0, **wild)


@pytest.fixture
def folder_with_torn_images(tmp_path: Path) -> Path:
    """Two classes of twelve images, of which the first of one and the third of the other are torn."""
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        for number in range(24):
            path = tmp_path / "images" / str(label) / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    for torn in ("0/00.png", "7/03.png"):
        path = tmp_path / "images" / torn
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path / "images"


def test_images_that_cannot_be_decoded_are_named_and_may_be_left_out(
    folder_with_torn_images: Path, tiny: Compress, tmp_path: Path
) -> None:
    def data(skip: int, resident: bool = True) -> dict[str, Any]:
        settings = {"source": str(folder_with_torn_images), "skip_bad": skip, "resident": resident, "workers": 0}
        return {"data": settings, "main": {"epochs": 1, "learning_rate": 0.05}}

    with pytest.raises(DataError, match=r"0/00\.png: cannot be decoded.*--skip-bad 1"):
        tiny(tmp_path / "deploy", **data(0))
    with pytest.raises(DataError, match=r"2 images cannot be decoded, and --skip-bad allows 1") as told:
        tiny(tmp_path / "deploy", **data(1))
    assert "7/03.png" in str(told.value)
    watching = Watching()
    found = tiny(tmp_path / "deploy", progress=watching, **data(2))
    assert sum("warning: left out" in note for note in watching.notes) == 2
    assert sum(found.read().data.images.values()) == 240 - 2
    streamed = tiny(tmp_path / "streamed", **data(2, resident=False))
    assert streamed.read().metrics == found.read().metrics


@pytest.mark.slow
def test_a_worker_process_that_dies_leaves_a_checkpoint(
    folder_with_torn_images: Path, tiny: Compress, tmp_path: Path
) -> None:
    settings = {"source": str(folder_with_torn_images), "skip_bad": 2, "resident": False, "workers": 1}

    def kill(done: int) -> None:
        if done == 3:
            for child in worker_processes():
                os.kill(child, signal.SIGKILL)

    with pytest.raises((DataError, InterruptedRun), match="worker process that decodes images died") as told:
        tiny(tmp_path / "deploy", progress=Watching(kill), checkpoint_every="2steps", data=settings)
    assert "--resume" in notes(told.value)
    found = tiny(tmp_path / "deploy", resume=True, data={**settings, "workers": 0})
    assert_same(found, tiny(tmp_path / "whole", data={**settings, "workers": 0}))


def worker_processes() -> list[int]:
    """Processes of torch's data loader below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        found.append((int(lines["Pid"]), int(lines["PPid"])))
    servers = {pid for pid, parent in found if parent == os.getpid()}
    return [pid for pid, parent in found if parent in servers]
