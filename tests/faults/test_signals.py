"""Ctrl-C and SIGTERM in every phase of a run, and what going on from there gives."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.outcomes import torn
from litdeploy.cli import main
from litdeploy.config.recipe import Recipe
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, InterruptedRun
from litdeploy.files import is_partial
from litdeploy.pipeline import deploy
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.trainer import train, trainer
from tests.faults.conftest import QUICK, STEPS, Compress, Watching, assert_same, result

FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "features in memory": {"feature_cache": 1},
    "features in files": {"feature_cache": 1, "feature_cache_dir": "features"},
    "sections alone": {"beta": 0.0, "feature_cache": 2},
    "hint": {"method": "hint", "hint_share": 0.5},
    "born-again": {"method": "born-again", "student_depth": None, "born_again": {"generations": 2}},
    "born-again by lit": {
        "method": "born-again",
        "student_depth": None,
        "born_again": {"generations": 2, "by": "lit"},
        "feature_cache": 1,
    },
    "born-again, features in files": {
        "method": "born-again",
        "student_depth": None,
        "born_again": {"generations": 2},
        "feature_cache_dir": "features",
        "feature_cache": 1,
    },
    "indistill": {"method": "indistill", "student_depth": None, "indistill": {"student": "resnet8,width=2"}},
    "indistill by pkt": {
        "method": "indistill",
        "student_depth": None,
        "indistill": {"student": "resnet8,width=2", "then": "pkt"},
        "feature_cache": 2,
    },
    "slimming": {"method": "slimming", "student_depth": None, "slimming": {"prune_ratio": 0.6}},
}


@pytest.fixture(scope="module")
def whole(tiny: Compress, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A run of each form that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return {form: tiny(folder / form.replace(" ", "-"), **_form(form, folder)) for form in FORMS}


def _form(form: str, folder: Path) -> dict[str, Any]:
    changes = dict(FORMS[form])
    if "feature_cache_dir" in changes:
        changes["feature_cache_dir"] = folder / "features"
    return changes


def stop(steps: int, number: int) -> Watching:
    """Sends the signal once so many steps of the process are done."""
    return Watching(lambda done: signal.raise_signal(number) if done == steps else None)


# In the middle of an epoch and at its last step; in the first phase and in the second.
# Of some forms, each epoch is a phase.
STOPS = dict.fromkeys(FORMS, (2, STEPS, 3 * STEPS - 2)) | {
    "eager": (2, STEPS, 2 * STEPS - 1, 3 * STEPS - 2, 4 * STEPS),
    "born-again": (2, 2 * STEPS + 1, 4 * STEPS),
    "born-again by lit": (2, STEPS + 2, 2 * STEPS + 2, 3 * STEPS + 2),
    "born-again, features in files": (STEPS, 3 * STEPS - 2),
    "indistill": (2, STEPS + 2, 2 * STEPS + 2, 3 * STEPS + 2),
    "indistill by pkt": (2, 3 * STEPS + 2),
    "slimming": (STEPS + 2, 2 * STEPS + 1, 4 * STEPS),
}


@pytest.mark.parametrize(("form", "steps"), [(form, steps) for form, stops in STOPS.items() for steps in stops])
def test_a_stopped_run_ends_bit_equal(
    form: str, steps: int, tiny: Compress, whole: dict[str, Bundle], tmp_path: Path
) -> None:
    changes = _form(form, tmp_path)
    with pytest.raises(InterruptedRun, match="--resume") as told:
        tiny(tmp_path / "deploy", progress=stop(steps, signal.SIGTERM), **changes)
    assert told.value.exit_code == 130
    assert Bundle(tmp_path / "deploy").read().status == "interrupted"
    again = Watching()
    found = tiny(tmp_path / "deploy", resume=True, progress=again, **changes)
    assert again.images == 16 * (4 * STEPS - steps + steps % STEPS + (STEPS if steps % STEPS == 0 else 0))
    assert_same(found, whole[form])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_closed_terminal_stops_a_run_unless_it_is_to_outlive_it(tiny: Compress, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="--resume"):
        tiny(tmp_path / "deploy", progress=stop(2, signal.SIGHUP))
    assert any(Bundle(tmp_path / "deploy").checkpoints_path.iterdir())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        found = tiny(tmp_path / "deploy", resume=True, progress=stop(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found.read().status == "complete"


class Crash(Exception):
    """Nothing that a run expects."""


class Crashing(Watching):
    """Ends the process's run as an epoch begins."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._epoch = epoch

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        if epoch == self._epoch:
            raise Crash


@pytest.mark.parametrize(
    ("form", "epoch"), [("eager", 3), ("born-again", 3), ("born-again by lit", 2), ("indistill", 3), ("slimming", 3)]
)
def test_a_run_that_crashed_between_two_phases_ends_bit_equal(
    form: str, epoch: int, tiny: Compress, whole: dict[str, Bundle], tmp_path: Path
) -> None:
    changes = {**_form(form, tmp_path), "checkpoint_every": "1epoch"}
    with pytest.raises(Crash):
        tiny(tmp_path / "deploy", progress=Crashing(epoch), **changes)
    again = Watching()
    found = tiny(tmp_path / "deploy", resume=True, progress=again, **changes)
    assert again.images == 16 * STEPS * (5 - epoch)
    assert_same(found, whole[form])


def test_a_run_stopped_again_and_again_ends_bit_equal(tiny: Compress, whole: dict[str, Bundle], tmp_path: Path) -> None:
    for _ in range(9):
        with pytest.raises(InterruptedRun):
            tiny(tmp_path / "deploy", resume=True, progress=Stepping(2), feature_cache=1)
    assert_same(tiny(tmp_path / "deploy", resume=True, feature_cache=1), whole["features in memory"])


class Stepping(Watching):
    """Stops after so many steps beyond those that are shown as done already."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self._left -= 1
        if not self._left:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("call", "so_far"), [(1, r"after 0 of 4 epochs\."), (2, "after 0 of 4 epochs and 5 steps")])
def test_stopped_while_it_validates(
    call: int,
    so_far: str,
    tiny: Compress,
    whole: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cut, or the student after its first epoch."""
    real, calls = trainer.evaluate, iter(range(1, 9))

    def evaluate(*arguments: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(InterruptedRun, match=so_far):
        tiny(tmp_path / "deploy")
    monkeypatch.undo()
    assert_same(tiny(tmp_path / "deploy", resume=True), whole["eager"])


class AtNote(Watching):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def note(self, text: str) -> None:
        if text.startswith(self._text):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("text", ["teacher: ", "testing teacher"])
def test_stopped_before_and_after_the_training(
    text: str, tiny: Compress, whole: dict[str, Bundle], tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun, match="--resume"):
        tiny(tmp_path / "deploy", progress=AtNote(text))
    again = Watching()
    assert_same(tiny(tmp_path / "deploy", resume=True, progress=again), whole["eager"])
    assert bool(again.images) is (text == "teacher: ")  # what is trained is not trained again


def test_the_second_signal_ends_at_once(tiny: Compress, tmp_path: Path) -> None:
    def twice(done: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun):
        tiny(tmp_path / "deploy", progress=Watching(twice))
    assert not Bundle(tmp_path / "deploy").checkpoints_path.exists()
    assert not Bundle(tmp_path / "deploy").manifest_path.exists()


def test_without_resume_it_is_offered(tiny: Compress, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        tiny(tmp_path / "deploy", progress=stop(2, signal.SIGINT))
    with pytest.raises(BundleError, match="--resume"):
        tiny(tmp_path / "deploy")
    with pytest.raises(BundleError, match="--resume"):
        Bundle(tmp_path / "deploy").read_complete()


def test_another_run_is_not_gone_on_with(tiny: Compress, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        tiny(tmp_path / "deploy", progress=stop(2, signal.SIGINT))
    kept = sorted(path.name for path in Bundle(tmp_path / "deploy").checkpoints_path.iterdir())
    with pytest.raises(BundleError, match=r"recipe\.seed: 0 there, 1 here"):
        tiny(tmp_path / "deploy", resume=True, seed=1)
    with pytest.raises(BundleError, match="data: "):
        tiny(tmp_path / "deploy", resume=True, data={"source": "digits"})
    assert sorted(path.name for path in Bundle(tmp_path / "deploy").checkpoints_path.iterdir()) == kept


def test_a_complete_run_is_not_done_again(tiny: Compress, tmp_path: Path) -> None:
    once = tiny(tmp_path / "deploy")
    before = once.student_path.stat().st_mtime_ns
    assert tiny(tmp_path / "deploy", resume=True).student_path.stat().st_mtime_ns == before
    with pytest.raises(BundleError, match=r"recipe\.seed"):
        tiny(tmp_path / "deploy", resume=True, seed=1)


def test_the_command_ends_with_130(teacher_path: Path, data_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "litdeploy", "compress", str(teacher_path), "--student-depth", "8", "--data"]
    command += [str(data_path), "--epochs", "5000", "--batch-size", "16", "--device", "cpu", "--out", "deploy"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) as job:
        metrics = tmp_path / "deploy" / "metrics.jsonl"
        while job.poll() is None and not (metrics.is_file() and metrics.read_text()):
            time.sleep(0.05)
        job.terminate()
        _, told = job.communicate(timeout=60)
    assert job.returncode == 130, told
    assert "--resume" in told
    assert "Traceback" not in told
    assert Bundle(tmp_path / "deploy").read().status == "interrupted"


# Python drops an interrupt that comes in the callback of a weak reference, and says so: the command goes on to its end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("command", [("export", "--onnx"), ("profile",)])
@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_what_is_made_of_a_student_is_stopped_and_done_again(
    command: tuple[str, ...], seconds: float, whole: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target.yaml").write_text(
        "{device: cpu, runners: [eager], batch_sizes: [1, 4], timing: {warmup_ms: 1, samples: 8}}"
    )
    shutil.copytree(whole["eager"].path, tmp_path / "deploy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["litdeploy", *command, "--target", "target.yaml"])
    # Stopped as it is imported, it would be half there for the rest of this process. A command's own process ends.
    importlib.import_module("onnxscript")
    # Where the command is quicker, the signal comes when it has put this one back.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert ended() in (0, 130)
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert not torn(tmp_path / "deploy")
    assert ended() == 0
    assert not torn(tmp_path / "deploy")
    assert not [path for path in (tmp_path / "deploy").rglob("*") if is_partial(path.name)]


def ended() -> int:
    """Exit code of the command line."""
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_training_from_new_weights_ends_bit_equal(data_path: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": "digits-resnet-teacher", "data": str(data_path), "device": "cpu", "epochs": 3}
    given |= {"batch_size": 16, "precision": "fp32"}
    whole = train("resnet8,width=4", out=tmp_path / "whole.safetensors", **given)
    with pytest.raises(InterruptedRun, match="after 1 of 3 epochs and 2 steps"):
        train("resnet8,width=4", out=tmp_path / "new.safetensors", progress=stop(STEPS + 2, signal.SIGINT), **given)
    with pytest.raises(BundleError, match="--resume"):
        train("resnet8,width=4", out=tmp_path / "new.safetensors", **given)
    found = train("resnet8,width=4", out=tmp_path / "new.safetensors", resume=True, **given)
    weights = read_checkpoint(whole.path).weights
    assert all(value.equal(weights[name]) for name, value in read_checkpoint(found.path).weights.items())
    assert (found.validation, found.test) == (whole.validation, whole.test)
    assert not (tmp_path / "new.checkpoints").exists()


def test_deploy_goes_on_with_the_training(teacher_path: Path, data_path: Path, tmp_path: Path) -> None:
    target = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
    given = {**QUICK, "data": {"source": str(data_path)}, "out": tmp_path / "deploy", "target": target}
    recipe = Recipe().with_(main=given.pop("main"), finetune=given.pop("finetune"))
    with pytest.raises(InterruptedRun):
        deploy(teacher_path, recipe=recipe, progress=stop(2 * STEPS + 1, signal.SIGTERM), **given)
    again = Watching(lambda done: signal.raise_signal(signal.SIGTERM) if done == 5 else None)
    with pytest.raises(InterruptedRun, match="after 2 of 4 epochs and 5 steps"):
        deploy(teacher_path, recipe=recipe, progress=again, **given)


@pytest.mark.gpu
def test_a_captured_run_is_gone_on_with(tiny: Compress, tmp_path: Path) -> None:
    """Steps beyond the capture, before and after: the learning rate and the momentum go on, and so do the losses."""
    given = {"device": "cuda", "main": {"epochs": 4, "learning_rate": 0.05}}
    whole = tiny(tmp_path / "whole", **given)
    with pytest.raises(InterruptedRun):
        tiny(tmp_path / "deploy", progress=stop(2 * STEPS + 2, signal.SIGTERM), **given)
    found = tiny(tmp_path / "deploy", resume=True, **given)
    (weights, rows, _), (others, other_rows, _) = result(found), result(whole)
    for row, other in zip(rows, other_rows, strict=True):
        assert row["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=0.05, atol=0.02, msg=name)


def test_the_command_line_tells_how_to_go_on(
    teacher_path: Path,
    data_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compress", teacher_path, "--student-depth", 8, "--data", data_path, "--method", "kd", "--batch-size", 16]
    words += [
        "--learning-rate",
        1e20,
        "--epochs",
        3,
        "--device",
        "cpu",
        "--checkpoint-every",
        "1step",
        "--out",
        tmp_path / "d",
    ]
    monkeypatch.setattr(sys, "argv", ["litdeploy", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--learning-rate" in told
    assert "the same command with --resume" in told.replace("\n", " ")
