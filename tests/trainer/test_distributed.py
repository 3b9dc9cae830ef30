from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.config.recipe import Recipe
from litdeploy.errors import DeviceError, SettingsError, TrainingError
from litdeploy.pipeline import deploy
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.trainer import compress, train
from litdeploy.trainer.distributed import ALONE, Launch, Ranks, check_recipe, divide, launched
from tests.trainer.test_golden import networks, transcription
from tests.trainer.two_ranks import DATA, NEW, SECTIONS, STOPPED, ten_steps

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = ["--recipe", "digits-resnet", "--student-depth", "8", "--epochs", "2000", "--device", "cpu"]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="module")
def two(teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left: see `two_ranks.main`."""
    out = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, "-m", "tests.trainer.two_ranks", str(teacher_path), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each of the two ranks has: sums are then made in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_ten_steps_of_two_ranks_equal_the_transcription_and_one_rank(two: Path) -> None:
    teacher, student = networks()
    formula = transcription(teacher, student)
    alone = ten_steps(ALONE)
    for rank in range(2):
        found = torch.load(two / f"steps-{rank}.pt")
        torch.testing.assert_close(found["losses"], torch.tensor(formula), rtol=1e-5, atol=1e-5)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            # As in the golden test: sums are rounded otherwise, and one activation falls on a ReLU's other side.
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_sections_on_two_ranks_are_bit_equal_to_one(
    two: Path, teacher_path: Path, tmp_path: Path, one_thread: None
) -> None:
    alone = compress(teacher_path, out=tmp_path / "alone", **SECTIONS)
    expected = read_checkpoint(alone.student_path).weights
    found = read_checkpoint(Bundle(two / "sections").student_path).weights
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert alone.read().metrics["student"] == Bundle(two / "sections").read().metrics["student"]
    shared, ours = rows(two / "sections"), rows(alone.path)
    assert [row.keys() for row in shared] == [row.keys() for row in ours]
    for row, other in zip(shared, ours, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert ours[1]["loss"] < ours[0]["loss"]


def test_the_batches_of_two_ranks_are_those_of_one(two: Path, teacher_path: Path, tmp_path: Path) -> None:
    alone = compress(teacher_path, out=tmp_path / "alone", **DATA)
    for row, other in zip(rows(two / "data"), rows(alone.path), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_two_ranks_train_a_network_as_one_does(two: Path, tmp_path: Path) -> None:
    alone = train("resnet8,width=4", out=tmp_path / "new.safetensors", epochs=1, **NEW)
    (row,), (other,) = (rows(path, "new.metrics.jsonl") for path in (two, tmp_path))
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert read_checkpoint(two / "new.safetensors").weights.keys() == read_checkpoint(alone.path).weights.keys()


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Of the epochs."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [row for row in found if row["phase"] != "cut"]


def test_an_error_of_the_first_rank_is_the_error_of_all(two: Path) -> None:
    assert sorted(path.name for path in two.glob("refused-*")) == ["refused-0", "refused-1"]


@pytest.mark.parametrize("name", STOPPED)
def test_two_ranks_that_were_stopped_end_bit_equal(two: Path, name: str) -> None:
    found, expected = (Bundle(two / f"{kind}-{name}") for kind in ("stopped", "whole"))
    assert found.read_complete().metrics == expected.read_complete().metrics
    weights = read_checkpoint(expected.student_path).weights
    assert all(value.equal(weights[key]) for key, value in read_checkpoint(found.student_path).weights.items())


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_of_torchrun(teacher_path: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "litdeploy", "compress", str(teacher_path), *LONG, "--out", str(tmp_path / "deploy")]
    with started(command, environment()) as job:
        wait_for_an_epoch(tmp_path / "deploy", job)
        killed = kill_rank_1(job.pid)
        _, told = job.communicate(timeout=30)  # the bound that is promised
    assert job.returncode not in {0, None}
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in told


@pytest.mark.slow
def test_a_rank_that_lost_the_other_says_so(teacher_path: Path, tmp_path: Path) -> None:
    """Started by nobody's agent, by srun's variables."""
    command = [sys.executable, "-m", "litdeploy", "compress", str(teacher_path), *LONG, "--out", str(tmp_path / "d")]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2"}
    of_rank = [environment(**meeting, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    with started(command, of_rank[0]) as first, started(command, of_rank[1]) as second:
        wait_for_an_epoch(tmp_path / "d", first, second)
        second.kill()
        _, told = first.communicate(timeout=30)
    assert first.returncode == 2
    assert "rank 0: the connection to rank 1 was lost" in told
    assert "Traceback" not in told
    assert not (tmp_path / "d" / "manifest.json").exists()


@contextmanager
def started(command: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            yield job
        finally:
            job.terminate()


def wait_for_an_epoch(bundle: Path, *jobs: subprocess.Popen[str]) -> None:
    metrics = bundle / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and metrics.read_text().count("\n"):
            return
        for job in jobs:
            assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no epoch in two minutes")


def kill_rank_1(agent: int) -> int:
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            return int(child)
    raise AssertionError("there is no rank 1")


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("recipe", "folder", "message"),
    [
        (Recipe(batch_size=7), False, "--batch-size 6"),
        (Recipe(batch_size=2), False, "--batch-size 4"),
        (Recipe(batch_size=8, feature_cache=4), False, "not cached by 2 ranks"),
        (Recipe(parallel="sections", beta=0.0), False, r"has 1 \(layer1\) for 2 ranks.*--parallel data"),
        (Recipe(batch_size=8), True, "--feature-cache-dir"),
        (Recipe(batch_size=8, compile="on", batch_norm="synchronised"), False, "--batch-norm per-rank"),
    ],
)
def test_what_two_ranks_cannot_train(recipe: Recipe, folder: bool, message: str) -> None:
    check_recipe(recipe, ALONE, ["layer1"], folder)
    with pytest.raises(TrainingError, match=message):
        check_recipe(recipe, Ranks(0, 2), ["layer1"], folder)


def test_sections_are_divided_by_cost() -> None:
    assert divide({"a": 3, "b": 5, "c": 4, "d": 1}, Ranks(0, 2)) == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert divide({"a": 0, "b": 0, "c": 0}, Ranks(0, 3)) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("changes", "message"), [({"beta": 0.5}, "--beta 0"), ({"method": "kd", "beta": 0.0}, "--parallel data")]
)
def test_dependent_sections_are_not_divided(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Recipe().with_(parallel="sections", **changes)


def test_only_the_training_is_shared(monkeypatch: pytest.MonkeyPatch, teacher_path: Path, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="litdeploy compress"):
        deploy(teacher_path, recipe="digits-resnet", student_depth=8, out=tmp_path / "deploy")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch(3, 4, 1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, Launch(1, 2, 0)),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            Launch(0, 8, 0),
        ),
        ({"WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Launch()),
    ],
    ids=["alone", "torchrun", "srun", "torchrun under srun", "alone in a job of four tasks"],
)
def test_how_a_process_was_started(variables: dict[str, str], expected: Launch) -> None:
    assert launched(variables) == expected


def test_incomplete_variables_are_named() -> None:
    with pytest.raises(TrainingError, match=r"RANK=, WORLD_SIZE=2, LOCAL_RANK=.*export WORLD_SIZE=1"):
        launched({"WORLD_SIZE": "2"})


def test_where_to_meet_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        Launch(0, 2).join(torch.device("cpu"))


@pytest.mark.gpu
def test_more_ranks_than_devices_are_refused() -> None:
    count = torch.cuda.device_count()
    assert Launch(0, count + 1, 0).device("cuda") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=f"--nproc-per-node {count}"):
        Launch(count, count + 1, count).device("cuda")
