"""Everything worth doing on a machine with a GPU, in one go and one JSON: make gpu-check [DATA=…] [TEACHER=…] [OUT=…]

The tests marked `gpu`, three benchmarks, and a short compress, export and profile. Without network, and without
`datasets`: DATA is a file that `litdeploy data pack` made. A part that fails or takes too long is said so in the JSON,
and the others still run; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from litdeploy.runtime import device_name, resolve_device

ROOT = Path(__file__).parents[1]
TAIL = 3000
TARGET = "target.yaml"
# Fewer batch sizes than `cuda` has, and less time for each.
TARGET_TEXT = """\
device: {device}
runners: [eager, compiled, onnxruntime]
batch_sizes: [1, 64]
timing: {{max_seconds: 5}}
"""


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        arguments: of Python.
        limit: seconds.
        result: a file that it writes: JSON, or pytest's XML.
    """

    name: str
    arguments: list[str]
    limit: float
    result: Path | None = None


def parts(arguments: argparse.Namespace, out: Path) -> list[Part]:
    """What is run, in this order. Their limits add up to less than ten minutes."""
    device, quick = arguments.device, ["--limit", "5", "--rounds", "3", "--steps", "1"] if arguments.quick else []
    bundle = str(out / "bundle")
    cli = ["-m", "litdeploy"]
    trainer = ["-m", "benchmarks.trainer", "--device", device]
    names = "tests.xml kernels.json trainer-128.json trainer-1024.json profiler.json bundle/profile/report.json"
    tests, kernels, small, large, timers, report = (out / name for name in names.split())
    marked = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={tests}"]
    compress = [*cli, "compress", arguments.teacher, "--data", arguments.data, "--student-depth", "20"]
    compress += ["--epochs", str(arguments.epochs), "--normalise", "imagenet", "--device", device, "--out", bundle]
    return [
        Part("tests", marked, 100, tests),
        Part("profiler", ["-m", "benchmarks.profiler", "--device", device, "--out", str(timers)], 50, timers),
        Part("kernels", ["-m", "benchmarks.kernels", "--device", device, "--out", str(kernels)], 80, kernels),
        Part("trainer", [*trainer, *(quick or ["--limit", "40"]), "--out", str(small)], 90, small),
        Part(
            "trainer, batch 1024",
            [*trainer, "--batch-size", "1024", *(quick or ["--limit", "40"]), "--out", str(large)],
            90,
            large,
        ),
        Part("compress", [*compress, "--overwrite", "--json"], 70),
        Part("export", [*cli, "export", bundle, "--onnx"], 30),
        Part("profile", [*cli, "profile", bundle, "--target", str(out / TARGET)], 70, report),
    ]


def main() -> int:
    arguments = _arguments()
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = resolve_device(arguments.device)
    (out / TARGET).write_text(TARGET_TEXT.format(device=arguments.device), encoding="utf-8")
    wanted = [part for part in parts(arguments, out) if not arguments.only or part.name in arguments.only.split(",")]
    found: dict[str, Any] = {
        "device": device_name(device),
        "machine": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "parts": {},
    }
    for part in wanted:
        print(f"── {part.name}: python {' '.join(part.arguments)}", flush=True)
        found["parts"][part.name] = outcome = _run(part, arguments.slack * part.limit)
        print(f"   exit {outcome['exit']}, {outcome['seconds']:.0f} s\n{outcome['output'][-1500:]}", flush=True)
        # After each part: what was measured is kept, whatever happens next.
        (out / "gpu-check.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, outcome in found["parts"].items() if outcome["exit"] != 0]
    print(f"{out / 'gpu-check.json'}: " + (f"failed: {', '.join(failed)}" if failed else "every part held"))
    return 1 if failed else 0


def _run(part: Part, limit: float) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603 (the parts are listed above)
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            text=True,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, output = 124, _text(late.stdout) + f"\n(stopped after {limit:.0f} s)"
    return {
        "command": "python " + " ".join(part.arguments),
        "exit": status,
        "seconds": round(time.perf_counter() - started, 1),
        "output": output[-TAIL:],
        "result": None if part.result is None else _result(part.result, started),
    }


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _result(path: Path, started: float) -> Any:
    if not path.is_file() or path.stat().st_mtime < time.time() - (time.perf_counter() - started) - 1:
        return None  # not there, or of an earlier run
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    suite = ElementTree.parse(path).getroot().find("testsuite")  # noqa: S314 (pytest has just written it)
    return None if suite is None else {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", default="gpu-check/cifar10.safetensors", help="a packed file, or any other --data")
    parser.add_argument("--teacher", default="../shared/teachers/cifar10-resnet56.th")
    parser.add_argument("--epochs", default=5, type=int)
    parser.add_argument("--out", default="gpu-check/out")
    parser.add_argument("--only", default="", help="names of parts, with commas between")
    parser.add_argument("--slack", default=1.0, type=float, help="times the time limits, for a slower machine")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that everything runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
