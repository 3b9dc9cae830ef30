"""The trainer's fused kernels, one at a time, against their references: python -m benchmarks.kernels [--device cuda]

At the shapes of recipes/, each as a step needs it, forward and backward, timed turn by turn in one run:

kernel      the fused kernel, which needs CUDA
eager       its reference in plain torch
compiled    the reference through torch.compile

Each both as it is called, launch by launch, and replayed from a CUDA graph, as the trainer runs it there. The bytes are
those that any of them must read and write at the least; what the device's caches hold from the call before is not read
again, so that the share of the copy bandwidth may be above 100 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import interleaved
from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import InputSpec
from litdeploy.data import Crops, augment, draw_crops, pixel_scale, standardise
from litdeploy.profiler.machine import roofline
from litdeploy.runtime import device_name, resolve_device, resolve_precision
from litdeploy.runtime.compilation import compiled
from litdeploy.trainer import kernels
from litdeploy.trainer.kernels import reference
from litdeploy.trainer.teacher import DTYPES

SECTIONS = ((16, 32), (32, 16), (64, 8))  # channels and size of a CIFAR ResNet's
SPEC = InputSpec(shape=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR_IMAGES = 50_000
# In one sample on CUDA: launching and waiting is then little of it.
CALLS = 20

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel: its name.
        bytes: that are read and written at the least.
        run: forward and backward by the function that is given.
        fused, plain, compilable: these functions; `compilable` is `plain` as `torch.compile` is to get it.
    """

    kernel: str
    shape: str
    bytes: int
    run: Callable[[Function], object]
    fused: Function
    plain: Function
    compilable: Function


def cases(device: torch.device, dtype: torch.dtype) -> list[Callable[[], Case]]:
    """Made one at a time, so that those before need not stay in memory."""
    return [
        *(partial(sections, batch, device, dtype) for batch in (128, 1024)),
        *(partial(distillation, 128, classes, device) for classes in (10, 100, 1000)),
        *(partial(augmentation, batch, device, dtype) for batch in (128, 1024)),
    ]


def sections(batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    def maps() -> Iterator[Tensor]:
        for channels, size in SECTIONS:
            made = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
            yield made.to(memory_format=torch.channels_last)

    students, teachers = [student.requires_grad_() for student in maps()], list(maps())
    upstream = torch.full((len(SECTIONS),), 0.75, device=device)
    shape = f"{batch} × ({' + '.join(f'{channels}×{size}×{size}' for channels, size in SECTIONS)}), {dtype}"
    return Case(
        "section_losses",
        shape,
        3 * sum(_bytes(student) for student in students),
        lambda function: torch.autograd.grad(function(students, teachers), students, upstream),
        kernels.section_losses,
        reference.section_losses,
        reference.section_losses,
    )


def distillation(batch: int, classes: int, device: torch.device) -> Case:
    logits, teacher = (torch.randn(batch, classes, device=device) for _ in range(2))
    labels = torch.randint(classes, (batch,), device=device)
    upstream = torch.tensor(0.5, device=device)
    logits.requires_grad_()
    return Case(
        "distillation_loss",
        f"{batch} × {classes}, {logits.dtype}",
        3 * _bytes(logits) + _bytes(labels),
        lambda function: torch.autograd.grad(function(logits, teacher, labels, 0.1, 4.0), logits, upstream),
        kernels.distillation_loss,
        reference.distillation_loss,
        reference.distillation_loss,
    )


def augmentation(batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    source = torch.randint(256, (CIFAR_IMAGES, *SPEC.shape), dtype=torch.uint8, device=device)
    rows = torch.randint(CIFAR_IMAGES, (batch,), device=device)
    crops = draw_crops(batch, Augmentation(padding=4, flip=True), torch.Generator().manual_seed(0)).to(device)
    scale = pixel_scale(SPEC, device)

    def compilable(source: Tensor, rows: Tensor, crops: Crops, spec: InputSpec, dtype: torch.dtype) -> Tensor:
        # `normalise` looks its scale up, which compiled would be made and copied to the device anew by each call.
        return standardise(augment(source.index_select(0, rows), crops), *scale, dtype)

    draws = sum(_bytes(each) for each in (rows, crops.tops_N, crops.lefts_N, crops.flips_N))
    return Case(
        "augmented",
        f"{batch} of {CIFAR_IMAGES} × {'×'.join(map(str, SPEC.shape))}, {dtype}",
        source[:batch].numel() * (1 + dtype.itemsize) + draws,
        lambda function: function(source, rows, crops, SPEC, dtype),
        kernels.augmented,
        reference.augmented,
        compilable,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` calls as one CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return graph.replay


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def candidates(
    case: Case, device: torch.device, compiles: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed, by name; and why others are not."""
    functions = {"kernel": case.fused} if kernels.fused_on(device) else {}
    functions["eager"] = case.plain
    missing = {}
    if compiles:
        functions["compiled"] = compiled(case.compilable)
    else:
        missing["compiled"] = "no time was left for it: give --limit more seconds"
    found: dict[str, Callable[[], object]] = {}
    for name, function in functions.items():
        call = partial(case.run, function)
        call()  # compiles
        if device.type == "cpu":
            found[name] = call
            continue
        found[name] = repeated(call)
        try:
            found[f"{name}, replayed"] = captured(call)
        except RuntimeError as error:
            torch.cuda.synchronize()
            missing[f"{name}, replayed"] = str(error).splitlines()[0]
    return found, missing


def measure(case: Case, device: torch.device, rate: float, rounds: int, until: float, compiles: bool) -> dict[str, Any]:
    """A case's figures; `until` is when no more round begins."""
    timed, missing = candidates(case, device, compiles)
    samples = interleaved.seconds(timed, device, rounds, until - time.perf_counter())
    calls = CALLS if device.type == "cuda" else 1
    seconds = {name: [each / calls for each in found] for name, found in samples.items()}
    first = next(iter(seconds))  # the kernel, where there is one
    medians = {name: interleaved.median(found) for name, found in seconds.items()}
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "bytes": case.bytes,
        "rounds": len(seconds[first]),
        "microseconds": {name: _rounded(found, 1e6) for name, found in medians.items()},
        "share_of_copy_bandwidth": {name: round(case.bytes / found.value / rate, 4) for name, found in medians.items()},
        "times_as_fast": {
            f"{ours} : {theirs}": _rounded(interleaved.ratio(seconds[theirs], seconds[ours]))
            for ours, theirs in _pairs(list(seconds))
        },
        "missing": missing,
    }


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first way against each other one, called against called and replayed against replayed."""
    for way in ("", ", replayed"):
        ours, *others = [name for name in names if name.partition(",")[2] == way[1:]] or [""]
        yield from ((ours, theirs) for theirs in others)


def _rounded(interval: interleaved.Interval, factor: float = 1) -> dict[str, float]:
    return {key: round(factor * value, 3) for key, value in asdict(interval).items()}


def _show(case: dict[str, Any]) -> None:
    print(f"\n{case['kernel']}, {case['shape']}: {case['bytes'] / 1e6:.3g} MB, {case['rounds']} rounds")
    for name, found in case["microseconds"].items():
        share = case["share_of_copy_bandwidth"][name]
        print(f"  {name:20} {found['value']:10.1f} µs ({found['low']:.1f}–{found['high']:.1f}) {share:8.1%} of copying")
    for pair, found in case["times_as_fast"].items():
        print(f"  {pair}: {found['value']:.2f} times as fast ({found['low']:.2f}–{found['high']:.2f})")
    for name, why in case["missing"].items():
        print(f"  {name}: left out; {why}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    started = time.perf_counter()
    arguments = _arguments(argv)
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    torch.manual_seed(0)
    rate = roofline.measure_rates(device, DTYPES[precision]).bytes
    print(
        f"{device_name(device)}, {precision}, torch {torch.__version__}; copying moves {rate / 1e9:,.1f} GB/s. "
        "Medians with 95 % intervals."
    )
    if not kernels.fused_on(device):
        print("The kernels need CUDA: only their references are timed here, eager and through torch.compile.")
    found: list[dict[str, Any]] = []
    slowest = 0.0  # seconds of making and timing a case, so far
    made = cases(device, DTYPES[precision])
    for number, case in enumerate(made):
        begun = time.perf_counter()
        left = max(0.0, started + arguments.limit - begun)
        found.append(
            measure(case(), device, rate, arguments.rounds, begun + left / (len(made) - number), left > slowest)
        )
        slowest = max(slowest, time.perf_counter() - begun)
        _show(found[-1])
    result = {
        "command": "python -m benchmarks.kernels " + " ".join(sys.argv[1:]),
        "device": device_name(device),
        "precision": precision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": getattr(sys.modules.get("triton"), "__version__", None),
        },
        "copy_bytes_per_s": rate,
        "seconds": round(time.perf_counter() - started, 1),
        "cases": found,
    }
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="See the module's docstring.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", default=50, type=int, help="of each case, at the most")
    parser.add_argument("--limit", default=50.0, type=float, help="seconds; after them three rounds of each case")
    parser.add_argument("--out", default=None, help="the JSON file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
