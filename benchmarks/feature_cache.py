"""What a feature cache of K views costs in accuracy: python -m benchmarks.feature_cache TEACHER DATA --student-depth 20

For each seed one student with fresh augmentation at every step, and one that sees each image in K views only; all else
is equal. Prints each pair, and the mean difference beside what seeds alone make of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleaved import Interval
from litdeploy.profiler.measure.statistics import mean_reach
from litdeploy.runtime import device_name, resolve_device
from litdeploy.storage.records import Accuracy
from litdeploy.trainer import compress


def accuracies(arguments: argparse.Namespace, seed: int, views: int | str) -> dict[str, float]:
    """Of one student."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = compress(
            arguments.teacher,
            data=arguments.data,
            student_depth=arguments.student_depth,
            epochs=arguments.epochs,
            recipe=arguments.recipe,
            seed=seed,
            feature_cache=views,
            device=arguments.device,
            out=Path(folder) / "bundle",
        )
        manifest = bundle.read_complete()
    validation, test = (manifest.metrics["student"][split] for split in ("validation", "test"))
    assert isinstance(validation, Accuracy)
    assert isinstance(test, Accuracy)
    return {
        "validation": validation.top1,
        "test": test.top1,
        "seconds": manifest.run.seconds,
        "images": manifest.data.images["train"],
    }


def main() -> None:
    arguments = _arguments()
    pairs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        # By turns, which of the two comes first: a machine that slows down slows both.
        order = ("off", arguments.views) if seed % 2 == 0 else (arguments.views, "off")
        found = {str(views): accuracies(arguments, seed, views) for views in order}
        pairs.append({"seed": seed, "fresh": found["off"], "kept": found[str(arguments.views)]})
        print(
            f"seed {seed}: test {pairs[-1]['fresh']['test']:.2%} fresh, {pairs[-1]['kept']['test']:.2%} with "
            f"{arguments.views} views; {pairs[-1]['fresh']['seconds']:.0f} s and {pairs[-1]['kept']['seconds']:.0f} s",
            flush=True,
        )
        _write(arguments, pairs)


def mean(samples: Sequence[float]) -> Interval:
    """The mean of a few figures, by Student's t."""
    middle = statistics.fmean(samples)
    half = mean_reach(samples)
    return Interval(middle, middle - half, middle + half)


def _write(arguments: argparse.Namespace, pairs: list[dict[str, Any]]) -> None:
    differences = [pair["kept"]["test"] - pair["fresh"]["test"] for pair in pairs]
    fresh = [pair["fresh"]["test"] for pair in pairs]
    result = {
        "command": "python -m benchmarks.feature_cache " + " ".join(sys.argv[1:]),
        "device": device_name(resolve_device(arguments.device)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "views": arguments.views,
        "epochs": arguments.epochs,
        "pairs": pairs,
        "mean_difference": asdict(mean(differences)) if len(pairs) > 1 else None,
        "standard_deviation_of_fresh_over_seeds": statistics.stdev(fresh) if len(fresh) > 1 else None,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if len(pairs) > 1:
        found = mean(differences)
        print(
            f"after {len(pairs)} seeds: {100 * found.value:+.2f} points ({100 * found.low:+.2f} to "
            f"{100 * found.high:+.2f}, 95 %) by {arguments.views} views; fresh students differ by "
            f"{100 * statistics.stdev(fresh):.2f} (standard deviation over seeds)",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feature_cache")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--recipe", default="cifar10-resnet")
    parser.add_argument("--student-depth", default=20, type=int)
    parser.add_argument("--epochs", default=10, type=int)
    parser.add_argument("--views", default=4, type=int)
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
