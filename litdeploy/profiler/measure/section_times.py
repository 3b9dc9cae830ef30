"""Time of each section of teacher and student in eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from litdeploy.batch import Batch, device_of, forward, moved, size_of
from litdeploy.networks import Network, Section
from litdeploy.networks.sections import without_caches
from litdeploy.profiler.schema import REMAINDER, SectionTime
from litdeploy.runtime.device import ieee_float32
from litdeploy.runtime.eager import placed

# Enough for a median in a bar chart.
_WARM_UP = 5
_BLOCKS = 32
_SECONDS = 2.0


def measure_sections(
    teacher: Network,
    student: Network,
    sections: tuple[Sequence[Section], Sequence[Section]],
    batch_sizes: Sequence[int],
    device: torch.device,
) -> tuple[SectionTime, ...]:
    """Time each section of both, with hooks before its first block and after its last.

    Args:
        sections: the teacher's, and the student's in the same order; one of which it has no block takes no time.
        batch_sizes: images per call.

    Returns:
        For each batch size: the sections in the given order, then stem and head.
    """
    with torch.inference_mode(), ieee_float32(device):
        modules = [placed(network, device, "fp32") for network in (teacher, student)]
        with _marking(modules[0], sections[0], device) as first, _marking(modules[1], sections[1], device) as second:
            found: list[SectionTime] = []
            for batch_size in batch_sizes:
                batch = moved(teacher.example(batch_size), device)
                found += _section_times(batch, [(modules[0], first), (modules[1], second)], sections)
    return tuple(found)


def _section_times(
    batch: Batch, sides: list[tuple[nn.Module, list[Any]]], sections: tuple[Sequence[Section], Sequence[Section]]
) -> Iterator[SectionTime]:
    """Time both sides in turn, TSST, on one batch."""
    for side in sides:
        for _ in range(_WARM_UP):
            _call(*side, batch)
    calls: list[list[list[Any]]] = [[], []]
    started = time.perf_counter()
    for _ in range(_BLOCKS):
        for place in (0, 1, 1, 0):
            calls[place].append(_call(*sides[place], batch))
        if time.perf_counter() - started > _SECONDS:
            break
    device = device_of(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    teacher, student = (
        np.median([_durations(marks, own) for marks in each], axis=0) for each, own in zip(calls, sections, strict=True)
    )
    for place, name in enumerate((*(section.name for section in sections[0]), REMAINDER)):
        yield SectionTime(
            name=name, batch_size=size_of(batch), teacher_ms=float(teacher[place]), student_ms=float(student[place])
        )


def _call(module: nn.Module, marks: list[Any], batch: Batch) -> list[Any]:
    """Marks in order: start, then start and end of each section with blocks, then end."""
    marks.clear()
    marks.append(_mark(device_of(batch)))
    forward(module, batch)
    marks.append(_mark(device_of(batch)))
    return list(marks)


def _durations(marks: list[Any], sections: Sequence[Section]) -> list[float]:
    """Milliseconds of each section, then of the rest."""
    spans = zip(marks[1:-1:2], marks[2:-1:2], strict=True)
    inside = [_ms_between(*next(spans)) if section.blocks else 0.0 for section in sections]
    return [*inside, _ms_between(marks[0], marks[-1]) - sum(inside)]


@contextmanager
def _marking(module: nn.Module, sections: Sequence[Section], device: torch.device) -> Iterator[list[Any]]:
    """In the `with` block, each forward pass adds two marks for each section with blocks to the list."""
    marks: list[Any] = []
    with without_caches(module), ExitStack() as hooks:
        for section in sections:
            if not section.blocks:
                continue
            blocks = section.blocks_in(module)
            hooks.callback(blocks[0].register_forward_pre_hook(lambda *_: marks.append(_mark(device))).remove)
            hooks.callback(blocks[-1].register_forward_hook(lambda *_: marks.append(_mark(device))).remove)
        yield marks


def _mark(device: torch.device) -> Any:
    """A point in time: nanoseconds on a CPU, an event on the current stream on CUDA."""
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _ms_between(start: Any, end: Any) -> float:
    return (end - start) / 1e6 if isinstance(start, int) else float(start.elapsed_time(end))
