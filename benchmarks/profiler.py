"""The profiler's timer against independent ones, and against itself: python -m benchmarks.profiler [--device cuda]

- A network in eager PyTorch, timed by the profiler and, in the same process, by torch.utils.benchmark, and on CUDA by
  triton.testing.do_bench: within 2 %.
- The same network against itself: the verdict must not be faster or slower, and two profiles, one after the other, must
  agree within their intervals.
- A runner that takes 5 ms: within 2 %; the timer's own overhead is reported too.

A failed check is repeated, since other work on the machine can make any of them fail: `--attempts`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from litdeploy.batch import Batch, device_of, moved
from litdeploy.config.target import Timing
from litdeploy.networks import new
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.measure.statistics import compare_sides, summarize
from litdeploy.profiler.measure.timing import time_pair
from litdeploy.profiler.schema import Timed
from litdeploy.runtime import Runner, open_runner, resolve_device

WITHIN = 0.02
ROUNDS = 12
TIMING = Timing(min_seconds=2.0, max_seconds=10.0, half_width=0.005)
ROUND = Timing(warmup_ms=20, half_width=0, samples=5_000, max_seconds=0.3)


class Sleeper:
    """A stand-in for a runner that takes 5 ms: it sleeps, and polls the clock during the last millisecond.

    A sleep alone ends 0.1 ms late or more.
    """

    def run(self, batch: Batch) -> Batch:
        end = time.perf_counter_ns() + 5_000_000
        time.sleep(0.004)
        while time.perf_counter_ns() < end:
            pass
        return batch


def against_independent_timers(runner: Runner, batch: Batch) -> dict[str, Any]:
    """Medians of alternating rounds, in ms, and the relative difference between the profiler and each timer."""
    timer = benchmark.Timer(
        "run(batch)", globals={"run": runner.run, "batch": batch}, num_threads=torch.get_num_threads()
    )
    timers: dict[str, tuple[Timing, Callable[[], float]]] = {
        "torch.utils.benchmark": (ROUND, lambda: 1e3 * float(timer.blocked_autorange(min_run_time=0.2).median))
    }
    if device_of(batch).type == "cuda":
        from triton.testing import do_bench

        # It empties the cache before each call, so the profiler does too.
        cold = ROUND.model_copy(update={"cold_cache": True})
        timers["triton.testing.do_bench"] = (
            cold,
            lambda: float(do_bench(lambda: runner.run(batch), warmup=20, rep=200, return_mode="median")),
        )
    found = {}
    for name, (timing, independent_ms) in timers.items():
        rounds = [(_profiled_ms(runner, batch, timing), independent_ms()) for _ in range(ROUNDS)]
        found[name] = {
            "profiler_ms": statistics.median(profiled for profiled, _ in rounds),
            "independent_ms": statistics.median(independent for _, independent in rounds),
            "apart": abs(statistics.median(profiled / independent for profiled, independent in rounds) - 1),
        }
    return {"held": all(each["apart"] <= WITHIN for each in found.values()), "timers": found}


def _profiled_ms(runner: Runner, batch: Batch, timing: Timing) -> float:
    timed = time_pair(runner, runner, batch, timing)
    return statistics.median(timed.teacher.milliseconds + timed.student.milliseconds)


def against_itself(runner: Runner, batch: Batch) -> dict[str, Any]:
    """One program as both sides, profiled twice."""
    profiles = [time_pair(runner, runner, batch, TIMING, seed=seed) for seed in (0, 1)]
    verdicts = [_comparison(timed).verdict for timed in profiles]
    sides = [summarize(timed.teacher.milliseconds + timed.student.milliseconds, len(batch)) for timed in profiles]
    intervals = [(side.median_low_ms or 0.0, side.median_high_ms or 0.0) for side in sides]
    agree = max(low for low, _ in intervals) <= min(high for _, high in intervals)
    return {
        "held": agree and not {"faster", "slower"} & set(verdicts),
        "verdicts": verdicts,
        "speedups": [_comparison(timed).speedup for timed in profiles],
        "intervals_ms": intervals,
        "stopped": [timed.stopped for timed in profiles],
    }


def _comparison(timed: Timed) -> Any:
    return compare_sides(timed.teacher.milliseconds, timed.student.milliseconds)


def asleep() -> dict[str, Any]:
    """A runner that takes 5 ms."""
    timed = time_pair(Sleeper(), Sleeper(), torch.zeros(1), TIMING)  # type: ignore[arg-type]
    median = statistics.median(timed.teacher.milliseconds)
    apart = abs(median - 5) / 5
    return {"held": apart <= WITHIN, "median_ms": median, "apart": apart, "overhead_ms": timed.overhead_ms}


def main() -> int:
    arguments = _arguments()
    device = resolve_device(arguments.device)
    network = new("resnet20", normalise="imagenet", input_shape=(3, 32, 32), classes=10, seed=0)
    network.module.eval()
    batch = moved(network.example(arguments.batch_size), device)
    result: dict[str, Any] = {"environment": current_environment(device).model_dump(mode="json"), "checks": {}}
    with pinned(torch.get_num_threads()), open_runner("eager", network=network, device=device) as runner:
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            "independent timers": lambda: against_independent_timers(runner, batch),
            "itself": lambda: against_itself(runner, batch),
            "asleep": asleep,
        }
        for name, check in checks.items():
            attempts: list[dict[str, Any]] = []
            while len(attempts) < arguments.attempts and not any(each["held"] for each in attempts):
                attempts.append(check())
                print(f"{name}: {json.dumps(attempts[-1])}", flush=True)
            result["checks"][name] = attempts
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, attempts in result["checks"].items() if not attempts[-1]["held"]]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiler")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--attempts", default=3, type=int, help="how often to repeat a check that fails")
    parser.add_argument("--out", default="", help="a JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
