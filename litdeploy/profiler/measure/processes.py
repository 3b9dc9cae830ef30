"""The whole measurement repeated in fresh processes: what differs from one start to the next, no sample tells.

Where memory lies, which kernels a library chose: each start draws them anew, and keeps them (Kalibera and Jones,
Rigorous Benchmarking in Reasonable Time, ISMM 2013). A child is
`python -m litdeploy.profiler.measure.processes JOB RESULT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from litdeploy.config.target import Target
from litdeploy.errors import LitdeployError, RunnerError, SettingsError
from litdeploy.networks import NetworkName
from litdeploy.profiler.machine.pinning import pinned
from litdeploy.profiler.measure.measuring import Progress, Results, measure_runners
from litdeploy.profiler.measure.merging import merge
from litdeploy.profiler.measure.pairs import BundlePairs, load_both
from litdeploy.profiler.schema import Failure, Measurement, RawSamples
from litdeploy.runtime import resolve_device
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Record

_TAIL = 2_000  # characters of what a child said before it died


class _Job(Record):
    """What a child measures."""

    bundle: str
    teacher: str
    target: Target
    network: str | None
    threads: int


class _Result(Record):
    """What it found; `error` is set where it could not even begin."""

    measurements: tuple[Measurement, ...] = ()
    samples: tuple[RawSamples, ...] = ()
    failures: tuple[Failure, ...] = ()
    error: str | None = None


def measure_in_processes(
    bundle: Bundle, teacher: str, target: Target, network: NetworkName | None, say: Progress
) -> Results:
    """Measures a bundle in `target.timing.processes` fresh processes, one after the other, and merges them.

    Args:
        teacher: the teacher's file.
        network: the network, where it is code of the user's: one that another process can import.

    Raises:
        SettingsError: it cannot.
        RunnerError: a process failed.
    """
    count = target.timing.processes
    job = _Job(
        bundle=str(bundle.path),
        teacher=teacher,
        target=target.model_copy(update={"timing": target.timing.model_copy(update={"processes": 1})}),
        network=_importable(network),
        threads=torch.get_num_threads(),
    )
    results = []
    with TemporaryDirectory(prefix="litdeploy-") as folder:
        for number in range(count):
            say(f"process {number + 1} of {count}")
            results.append(_run(job, Path(folder), say))
    return merge(results)


def _importable(network: NetworkName | None) -> str | None:
    """The network as text."""
    if network is None or isinstance(network, str):
        return network
    text = f"{network.__module__}:{getattr(network, '__qualname__', '<locals>')}"
    if isinstance(network, nn.Module) or "<locals>" in text or text.startswith("__main__:"):
        raise SettingsError(
            "processes: a fresh process cannot import this network. Put its class or function into a module of its "
            "own, and pass network='package.module:function'."
        )
    return text


def _run(job: _Job, folder: Path, say: Progress) -> Results:
    asked, answered = folder / "job.json", folder / "result.json"
    asked.write_text(job.model_dump_json(), encoding="utf-8")
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", "litdeploy.profiler.measure.processes", str(asked), str(answered)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        (folder / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors,
        # litdeploy's own module, by the interpreter that runs this.
        subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            say(line.rstrip("\n"))
        status = child.wait()
        errors.seek(0)
        said = errors.read()
    if not answered.is_file():
        raise RunnerError(f"a measuring process ended with status {status}:\n{said[-_TAIL:].strip()}")
    result = _Result.model_validate_json(answered.read_bytes())
    if result.error is not None:
        raise RunnerError(result.error)
    return Results(list(result.measurements), list(result.samples), list(result.failures))


def main(asked: Path, answered: Path) -> None:
    """A child's work."""
    job = _Job.model_validate_json(asked.read_bytes())
    torch.set_num_threads(job.threads)
    try:
        result = _measured(job)
    except LitdeployError as error:
        result = _Result(error=str(error))
    partial = answered.with_suffix(".partial")
    partial.write_text(result.model_dump_json(), encoding="utf-8")
    partial.replace(answered)


def _measured(job: _Job) -> _Result:
    def say(line: str) -> None:
        print(line, flush=True)

    bundle, device = Bundle(job.bundle), resolve_device(job.target.device)
    manifest = bundle.read_complete()
    networks = load_both(bundle, manifest, job.teacher, job.network)
    with pinned(torch.get_num_threads()):
        found = measure_runners(BundlePairs(bundle, manifest, networks, device, say), job.target, device, say)
    return _Result(measurements=tuple(found.measurements), samples=tuple(found.samples), failures=tuple(found.failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
