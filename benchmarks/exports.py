"""A bundle's exported files: size, error, accuracy and latency of each, the files timed turn by turn.

    python -m benchmarks.exports BUNDLE --target cpu --out FILE.json

The bundle is exported already; `litdeploy verify` is run on it. A bf16 ONNX file is not timed on a processor, where it
runs in fp32 with each result rounded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import interleaved
from litdeploy.batch import moved
from litdeploy.config.formats import FORMATS, format_of
from litdeploy.config.target import Target
from litdeploy.evaluation.verify import verify
from litdeploy.networks import load
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.runtime import Runner, open_runner, resolve_device, resolve_target
from litdeploy.storage.bundle import Bundle

_ROUNDS, _SECONDS = 200, 30.0


def _runner(kind: str, path: Path, device: torch.device, target: Target) -> Runner:
    return open_runner(FORMATS[format_of(kind)].runner, path=path, device=device, memory_limit=target.memory_limit)


def measured(bundle: Bundle, target_name: str) -> dict[str, Any]:
    """Milliseconds of a call of each file at the target's least and largest batch: medians with 95 % intervals."""
    target = resolve_target(target_name)
    device = resolve_device(target.device)
    manifest = bundle.read_complete()
    student = load(bundle.student_path)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        runners = {
            kind: stack.enter_context(_runner(kind, bundle.artefact_path(artefact), device, target))
            for kind, artefact in manifest.artefacts.items()
        }
        timed = {kind: runner for kind, runner in runners.items() if "rounded" not in runner.describe().mode}
        for size in (target.batch_sizes[0], target.batch_sizes[-1]):
            batch = moved(student.example(size), device)
            calls = {kind: partial(runner.run, batch) for kind, runner in timed.items()}
            samples = interleaved.seconds(calls, device, _ROUNDS, _SECONDS)
            for kind, seconds in samples.items():
                interval = interleaved.median([1e3 * each for each in seconds])
                found.setdefault(kind, {})[f"batch {size}, ms"] = {
                    **dataclasses.asdict(interval),
                    "samples": len(seconds),
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    bundle = Bundle(arguments.bundle)
    latencies = measured(bundle, arguments.target)
    environment = current_environment(resolve_device(resolve_target(arguments.target).device))
    load_average = round(os.getloadavg()[0], 2)
    verification = verify(bundle, target=arguments.target, progress=print)
    artefacts = bundle.read_complete().artefacts
    content = {
        "environment": environment.model_dump(mode="json"),
        "load_average_after_timing": load_average,
        "bytes": {kind: artefact.details["bytes"] for kind, artefact in artefacts.items()},
        "latency": latencies,
        "verification": verification.model_dump(mode="json"),
    }
    arguments.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for each in verification.differences:
        times = " | ".join(f"{value['value']:.2f}" for value in latencies.get(each.candidate, {}).values()) or "– | –"
        size = f"{artefacts[each.candidate].details['bytes'] / 1e6:.2f}" if each.candidate in artefacts else "–"
        accuracy = each.candidate_accuracy.summary() if each.candidate_accuracy else "–"
        print(f"| {each.candidate} | {size} | {accuracy} | {times} |")


if __name__ == "__main__":
    main()
