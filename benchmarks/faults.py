"""Kills compress and export at random moments, lets them go on, and holds what comes out against runs left alone.

    python -m benchmarks.faults --kills 1000

A warm parent imports everything and forks: each child is a whole, real run on tiny data (a ResNet-8 of width 4 on a
hundred 8×8 digits), ended by SIGKILL, which no code of ours sees. Half of the moments are drawn from the clock; half
are the n-th time that the child opens, renames or removes a file in its bundle, where the dangerous gaps are. A run is
killed one to three times, then left to end.

What this shows: whatever instant a process dies in, what it leaves is whole, its lock is free, and going on gives the
very bits of a run that was never stopped. What it does not: a machine that loses power (the kernel outlives these
kills, and with it what was written and not yet on the disk), a GPU, several ranks, large files.

The parent never computes: no thread of torch's is there to be lost by a fork, and OMP_NUM_THREADS is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.outcomes import exported, outcome, torn

_QUICK: dict[str, Any] = {
    "student_depth": 8,
    "precision": "fp32",
    "compile": "off",
    "device": "cpu",
    "batch_size": 16,
    "main": {"epochs": 2, "learning_rate": 0.05},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
    "checkpoint_every": "2steps",
}

# `files`: features in memory-mapped files, in a folder that is given. `generator`: LIT, then against a discriminator.
SCENARIOS: dict[str, dict[str, Any]] = {
    "eager": {**_QUICK, "feature_cache": "off"},
    "features": {**_QUICK, "feature_cache": 1},
    "files": {**_QUICK, "feature_cache": 1},
    "sections": {**_QUICK, "feature_cache": 1, "beta": 0.0},
    "hint": {**_QUICK, "feature_cache": "off", "method": "hint", "hint_share": 0.4},
    "generator": {
        **_QUICK,
        "student_depth": 10,
        "beta": 0.0,
        "optimiser": "adamw",
        "betas": [0.5, 0.999],
        "main": {"epochs": 2, "learning_rate": 0.01},
        "finetune": {"epochs": 1, "learning_rate": 1e-4},
        "input_shape": (1, 8, 8),
    },
}
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

Job = Callable[[], object]


class Bench:
    """A teacher, data and reference runs in one folder.

    Args:
        folder: empty.
        random: draws all moments.
    """

    def __init__(self, folder: Path, random: random.Random) -> None:
        self._folder = folder
        self._random = random
        self._log = folder / "child.log"
        self._seconds: dict[str, float] = {}
        self._events: dict[str, int] = {}
        self._expected: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []
        self.kills = 0
        self.resumes = 0
        self._must(self._prepare)

    def compress(self, scenario: str, number: int) -> None:
        """One run: killed, resumed and compared."""
        if scenario not in self._expected:
            self._expected[scenario] = self._reference(scenario, self._folder / f"reference-{scenario}")
        out = self._folder / f"{scenario}-{number}"
        for _ in range(self._random.choice((1, 1, 2, 3))):
            if not self._kill(scenario, self._compress(scenario, out), out):
                break
            self._check_whole(out, f"{scenario} {number}")
        self.resumes += 1
        if self._succeeds(self._compress(scenario, out), f"{scenario} {number}: going on"):
            found = outcome(out)
            for key, value in self._expected[scenario].items():
                if found[key] != value:
                    self.failures.append(f"{scenario} {number}: {key} differ")
            self._check_clean(out, f"{scenario} {number}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(self._features(out), ignore_errors=True)

    def export(self, number: int) -> None:
        """One export: killed, done again, and compared."""
        whole = self._folder / "reference-eager"
        if "eager" not in self._expected:
            self._expected["eager"] = self._reference("eager", whole)
        if "export" not in self._expected:
            reference = self._folder / "reference-export"
            shutil.copytree(whole, reference)
            self._expected["export"] = self._measure("export", _export(reference), reference, exported)
        out = self._folder / f"export-{number}"
        shutil.copytree(whole, out)
        if self._kill("export", _export(out), out):
            self._check_whole(out, f"export {number}")
        self.resumes += 1
        if self._succeeds(_export(out), f"export {number}: once more"):
            if exported(out) != self._expected["export"]:
                self.failures.append(f"export {number}: another file than without the kill")
            self._check_clean(out, f"export {number}")
        shutil.rmtree(out)

    def _prepare(self) -> None:
        from litdeploy.data import pack
        from litdeploy.networks import new
        from litdeploy.storage.checkpoint import write_checkpoint

        made = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
        spec = made.spec.with_(classes=tuple("0123456789"))
        write_checkpoint(self._folder / "teacher.safetensors", made.module.state_dict(), spec)
        for name, network in (
            ("G", new("stargan,blocks=3,domains=10,width=2,in_channels=1", normalise=None, classes=10, seed=3)),
            (
                "D",
                new(
                    "stargan-discriminator,layers=2,width=2,image_size=8,in_channels=1",
                    normalise=None,
                    classes=10,
                    seed=4,
                ),
            ),
        ):
            write_checkpoint(self._folder / f"{name}.safetensors", network.module.state_dict(), network.spec)
        pack("digits", self._folder / "digits.safetensors", train_images=120, limit=120)

    def _compress(self, scenario: str, out: Path) -> Job:
        from litdeploy.trainer import compress

        given: dict[str, Any] = {**SCENARIOS[scenario], "data": self._folder / "digits.safetensors"}
        if scenario == "files":
            given["feature_cache_dir"] = self._features(out)
        teacher = self._folder / "teacher.safetensors"
        if scenario == "generator":
            teacher, given["discriminator"] = self._folder / "G.safetensors", str(self._folder / "D.safetensors")
        return lambda: compress(teacher, out=out, resume=True, **given)

    def _features(self, out: Path) -> Path:
        return out.with_name(f"{out.name}-features")

    def _reference(self, scenario: str, out: Path) -> dict[str, Any]:
        return self._measure(scenario, self._compress(scenario, out), out, outcome)

    def _measure(self, name: str, job: Job, out: Path, found: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Runs a job undisturbed: how long it takes, how often it touches its files, and what comes out."""
        counted = self._folder / "events"
        started = time.perf_counter()
        self._must(lambda: _watched(job, out, lambda number: None, counted))
        self._seconds[name] = time.perf_counter() - started
        self._events[name] = int(counted.read_text())
        print(f"{name}: {self._seconds[name]:.2f} s, {self._events[name]} events", flush=True)
        return found(out)

    def _kill(self, name: str, job: Job, out: Path) -> bool:
        """Whether the job was killed; it may have been faster."""
        if self._random.random() < 0.5:
            pid = self._fork(job)
            time.sleep(self._random.uniform(0, self._seconds[name]))
            os.kill(pid, signal.SIGKILL)
        else:
            fatal = self._random.randint(1, self._events[name])

            def touch(number: int) -> None:
                if number == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            pid = self._fork(lambda: _watched(job, out, touch, None))
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        self.kills += killed
        return killed

    def _fork(self, job: Job) -> int:
        """A child that does the job, with its output in a file."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            job()
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _succeeds(self, job: Job, what: str) -> bool:
        if os.waitpid(self._fork(job), 0)[1] == 0:
            return True
        self.failures.append(f"{what} failed:\n{self._log.read_text()[-2000:]}")
        return False

    def _must(self, job: Job) -> None:
        if not self._succeeds(job, "a run that nobody stopped"):
            raise SystemExit(self.failures[-1])

    def _check_whole(self, out: Path, what: str) -> None:
        """No file under a final name is torn, and nobody holds the lock."""
        self.failures += [f"{what}: {fault}" for fault in torn(out)]

    def _check_clean(self, out: Path, what: str) -> None:
        left = [path.name for path in out.rglob("*") if ".partial" in path.name or path.name == ".lock.json"]
        left += ["checkpoints"] * (out / "checkpoints").exists()
        if left:
            self.failures.append(f"{what}: left {', '.join(left)}")


def _export(out: Path) -> Job:
    from litdeploy.config.target import Target
    from litdeploy.exporter import export

    target = Target(device="cpu", runners=("onnxruntime",), batch_sizes=(1,))
    return lambda: export(out, onnx=True, target=target)


def _watched(job: Job, out: Path, touch: Callable[[int], None], counted: Path | None) -> None:
    """Does a job; `touch` is called with the number of each event among its files, before it happens."""
    number = 0
    inside = str(out.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event in _EVENTS and str(arguments[0]).startswith(inside):
            number += 1
            touch(number)

    sys.addaudithook(hook)
    job()
    if counted is not None:
        counted.write_text(str(number))


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        again = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S606 (its own command)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", default=1000, type=int, help="of both together, at the least")
    parser.add_argument("--export-share", default=0.2, type=float)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--out", default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    # What all children would import, once; but not onnxruntime, which starts a thread.
    for name in ("onnxscript", "torch._dynamo", "litdeploy.exporter", "litdeploy.trainer"):
        importlib.import_module(name)
    draw = random.Random(arguments.seed)
    started = time.perf_counter()
    exports = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), draw)
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads == 1, f"{threads} threads: a fork would lose all but one"
        number = 0
        while bench.kills < arguments.kills and not bench.failures:
            number += 1
            if exports < arguments.export_share * bench.kills:
                before = bench.kills
                bench.export(number)
                exports += bench.kills - before
            else:
                bench.compress(list(SCENARIOS)[number % len(SCENARIOS)], number)
            if number % 50 == 0:
                print(f"{bench.kills} kills, {len(bench.failures)} failures", flush=True)
    result = {
        "command": "python -m benchmarks.faults " + " ".join(sys.argv[1:]),
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("litdeploy", "torch", "onnxruntime-gpu", "filelock")},
        "kills": bench.kills,
        "of_exports": exports,
        "resumes": bench.resumes,
        "failures": bench.failures,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
