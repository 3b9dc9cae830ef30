"""Mutated files of every kind against what opens them: python -m benchmarks.fuzz --inputs 10000 --out fuzz.json

Each input is opened in a worker process within a limit of address space and of time. Right is that it loads, or that
litdeploy says what is wrong; a finding is anything else: another exception, a worker that dies, a limit that is
reached, and above all a canary: a file that appears where a pickle, a tag or an import ran code.

With `--atheris` one kind is fuzzed by coverage instead, in this process, where atheris is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.mutations import CANARY_FILE

_LIBRARIES = ("torch", "safetensors", "datasets", "pyarrow", "pandas", "pillow", "onnx", "onnxruntime-gpu", "pyyaml")
# An input beyond it, when the worker is killed. The clock is the wall's, and other work may be beside.
_SECONDS = 60.0
# Of address space over what a worker has when all libraries are loaded: files here have 100 KB.
_MOST_GIB = 3.0
# What happens in this process that no file may bring about.
_FORBIDDEN_EVENTS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect"}


@dataclass
class Outcome:
    """What became of one input.

    Attributes:
        result: `loaded`, the name of litdeploy's error, or `finding`.
        detail: of a finding.
        mib: by which resident memory grew at most.
    """

    kind: str
    number: int
    result: str
    detail: str = ""
    seconds: float = 0.0
    mib: float = 0.0


def main() -> None:
    arguments = _arguments()
    if arguments.atheris:
        _atheris(arguments.atheris, arguments.seconds)
        return
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="litdeploy-fuzz-") as folder, contextlib.suppress(KeyboardInterrupt):
        _campaign(arguments, Path(folder), outcomes)
    result = _summary(arguments, outcomes, time.perf_counter() - started)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")
    print(text)
    sys.exit(1 if result["findings"] else 0)


def _campaign(arguments: argparse.Namespace, folder: Path, outcomes: list[Outcome]) -> None:
    """All inputs, the kinds in turn; a worker that died is replaced. Ctrl-C ends it, and what was done counts."""
    from benchmarks.loaders import KINDS, real_bundle

    real_bundle()
    kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
    inputs = [
        (kinds[number % len(kinds)], arguments.first + number // len(kinds)) for number in range(arguments.inputs)
    ]
    worker = _Worker(folder, arguments.seed)
    for index, (kind, number) in enumerate(inputs):
        outcomes.append(worker.run(kind, number))
        found = outcomes[-1]
        if found.result == "finding":
            print(f"{kind} {number}: {found.detail}", flush=True)
        if worker.process is None:
            worker = _Worker(folder, arguments.seed)
        if index % 500 == 499:
            print(f"{index + 1} of {len(inputs)}", flush=True)
    worker.stop()


class _Worker:
    """A process that opens inputs; None as its process once it is dead."""

    def __init__(self, folder: Path, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self.process: Any = context.Process(target=_serve, args=(there, str(folder), seed), daemon=True)
        self.process.start()
        there.close()
        self._here.recv()  # ready

    def run(self, kind: str, number: int) -> Outcome:
        started = time.perf_counter()
        self._here.send((kind, number))
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._here.poll(_SECONDS):
                return Outcome(*self._here.recv())
            self.process.kill()
            self.process.join()
            self.process = None
            return Outcome(kind, number, "finding", f"not done after {_SECONDS:.0f} s", time.perf_counter() - started)
        self.process.join()
        code, self.process = self.process.exitcode, None
        return Outcome(kind, number, "finding", f"the worker died (exit code {code})", time.perf_counter() - started)

    def stop(self) -> None:
        self._here.close()
        if self.process is not None:
            self.process.join(10)
            self.process.kill()


def _serve(pipe: Connection, folder: str, seed: int) -> None:
    """A worker's life."""
    import faulthandler

    faulthandler.enable()
    root = Path(folder) / f"worker-{os.getpid()}"
    root.mkdir()
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        os.environ[name] = str(root / "cache")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    from benchmarks.loaders import KINDS, canary_module, draw

    torch.set_num_threads(1)
    os.chdir(root)
    canary_module(root)
    sys.path.insert(0, str(root))
    warnings.simplefilter("ignore")
    files = {name: make(kind, root / "made") for name, kind in KINDS.items()}
    for name, kind in KINDS.items():  # valid, and every library is loaded
        place(files[name], root / "input")
        kind.load(root / "input")
    _limit()
    sys.addaudithook(_forbid)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            name, number = pipe.recv()
            random = Random(f"{seed} {name} {number}")
            place(draw(KINDS[name], files[name], random), root / "input")
            pipe.send(opened(name, number, KINDS[name].load, root))
            shutil.rmtree(root / "cache", ignore_errors=True)


def make(kind: Any, folder: Path) -> dict[str, bytes]:
    """A kind's valid files, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kind.make(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place(files: dict[str, bytes], folder: Path) -> None:
    """Writes them, and nothing else is there."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + int(_MOST_GIB * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))


def _forbid(event: str, arguments: Any) -> None:
    if event in _FORBIDDEN_EVENTS:
        Path(CANARY_FILE).touch()


def opened(name: str, number: int, load: Any, root: Path) -> tuple[Any, ...]:
    """Opens what is in `root / "input"`, and tells the fields of its `Outcome`."""
    from litdeploy.errors import LitdeployError

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _resident("VmRSS"), time.perf_counter()
    result, detail = "loaded", ""
    try:
        load(root / "input")
    except LitdeployError as error:
        result = type(error).__name__
        if not str(error).strip() or "Traceback" in str(error):
            result, detail = "finding", f"a message that tells nothing: {error}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in last if "litdeploy/" in frame.filename and "site-packages" not in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        result, detail = "finding", f"{type(error).__name__} at {where}: {str(error)[:300]}"
    seconds, grown = time.perf_counter() - started, (_resident("VmHWM") - before) / 1024
    for canary in (root / CANARY_FILE, root / "input" / CANARY_FILE, root.parent / CANARY_FILE, Path("/canary")):
        if canary.exists():
            canary.unlink()
            result, detail = "finding", "CANARY: code was run"
    return name, number, result, detail, seconds, grown


def _resident(field: str) -> int:
    """Of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _summary(arguments: argparse.Namespace, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    from litdeploy.runtime import device_name, resolve_device

    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    return {
        "command": "python -m benchmarks.fuzz " + " ".join(sys.argv[1:]),
        "device": device_name(resolve_device("cpu")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "inputs": len(outcomes),
        "seconds": round(seconds, 1),
        "limits": {"seconds": _SECONDS, "address_space_gib": _MOST_GIB},
        "canaries": sum("CANARY" in outcome.detail for outcome in outcomes),
        "kinds": {kind: _of_kind([each for each in outcomes if each.kind == kind]) for kind in kinds},
        "findings": [asdict(outcome) for outcome in outcomes if outcome.result == "finding"],
    }


def _of_kind(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "inputs": len(outcomes),
        "outcomes": dict(sorted(Counter(outcome.result for outcome in outcomes).items())),
        "longest_seconds": round(max(outcome.seconds for outcome in outcomes), 2),
        "most_mib": round(max(outcome.mib for outcome in outcomes), 1),
    }


def _atheris(name: str, seconds: int) -> None:
    """Coverage of litdeploy's own code decides what is mutated further."""
    import atheris

    with atheris.instrument_imports(include=["litdeploy"]):
        from benchmarks.loaders import KINDS
        from litdeploy.errors import LitdeployError
    kind = KINDS[name]
    root = Path(tempfile.mkdtemp(prefix="litdeploy-fuzz-"))
    files = make(kind, root / "made")
    warnings.simplefilter("ignore")

    def one_input(content: bytes) -> None:
        place({**files, kind.victims[0]: content}, root / "input")
        with contextlib.suppress(LitdeployError):
            kind.load(root / "input")

    corpus = root / "corpus"
    corpus.mkdir()
    for victim in kind.victims:
        (corpus / Path(victim).name).write_bytes(files[victim])
    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-rss_limit_mb=4096"], one_input)
    atheris.Fuzz()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--inputs", default=10_000, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--kinds", help="names, separated by semicolons; none: all")
    parser.add_argument("--first", default=0, type=int, help="number of the first input of each kind")
    parser.add_argument("--atheris", metavar="KIND", help="fuzz this kind by coverage instead")
    parser.add_argument("--seconds", default=60, type=int, help="how long, with --atheris")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
