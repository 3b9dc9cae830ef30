"""Fidelity: where the student's error enters and how it compounds, on the teacher's inputs and in its own chain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward, size_of, tensors_of
from litdeploy.data import prepared
from litdeploy.errors import DataError
from litdeploy.exporter.evidence import open_test_data
from litdeploy.networks import Network, Section, answer_of
from litdeploy.networks.sections import recording, run_section
from litdeploy.profiler.schema import Deviation, Fidelity
from litdeploy.runtime.eager import placed
from litdeploy.storage.records import Manifest
from litdeploy.tasks import Task, task_of

STEM = "stem"

_IMAGES = 256
_BATCH_SIZE = 64


# Sections of the teacher, and those of the student in the same order.
Pairs = tuple[Sequence[Section], Sequence[Section]]


def measure_fidelity(
    manifest: Manifest, teacher: Network, student: Network, sections: Pairs, device: torch.device
) -> Fidelity:
    """Measure fidelity on test samples of the bundle's own dataset.

    Args:
        sections: the teacher's, and the student's.

    Raises:
        DataError: the dataset is missing, or has no test samples.
    """
    # Only the compared samples of a large split are decoded, in this process.
    if manifest.recipe.data.source is None:
        raise DataError(f"the data were given in Python ({manifest.data.source}), and a bundle has none of them")
    settings = manifest.recipe.data.model_copy(update={"resident": False, "workers": 0})
    data = open_test_data(manifest, settings, student, device)
    assert data is not None
    split = data.test
    if not len(split):
        raise DataError(f"{data.source}: its test split is empty.")
    rows = torch.linspace(0, len(split) - 1, min(len(split), _IMAGES)).round().long()
    picks = split.pick(torch.split(rows, _BATCH_SIZE))
    batches = (prepared(picked.images(), student.spec.input, picked.labels_N) for picked in picks)
    modules = placed(teacher, device, "fp32"), placed(student, device, "fp32")
    return compare_sections(*modules, sections, batches, task_of(student.spec))


@torch.no_grad()
def comparable(teacher: Network, student: Network, sections: Pairs) -> bool:
    """Whether there are sections, each with the same input and output shapes in both; a narrower student's differ."""
    with recording(teacher.module, sections[0]) as whole, recording(student.module, sections[1]) as own:
        forward(teacher.module, teacher.example(1))
        forward(student.module, teacher.example(1))
    return bool(own) and all(
        (call.input.shape, call.output.shape) == (whole[name].input.shape, whole[name].output.shape)
        for name, call in own.items()
    )


@torch.no_grad()
def compare_sections(
    teacher: nn.Module, student: nn.Module, sections: Pairs, batches: Iterable[Batch], task: Task[Any]
) -> Fidelity:
    """Compare a student with its teacher: stem, sections and output.

    Args:
        teacher, student: in eval mode, on the batches' device.
        sections: at least one; the student's may have no block, and are then left out.
        batches: what both take, at least one.
    """
    own_sections = {section.name: section for section in sections[1] if section.blocks}
    names = [section.name for section in sections[0] if section.name in own_sections]
    last = own_sections[names[-1]].blocks_in(student)[-1]
    places = {place: (_Difference(), _Difference()) for place in (STEM, *names, task.output)}
    agreeing: tuple[list[int | None], list[int | None]] = ([], [])
    count = 0
    with recording(teacher, sections[0]) as whole, recording(student, list(own_sections.values())) as own:
        for batch in batches:
            output, own_output = (answer_of(forward(each, batch), task.name) for each in (teacher, student))
            # The student's own chain first: running its parts alone records anew.
            for name in names:
                places[name][1].add(own[name].output, whole[name].output)
            for difference in places[STEM]:  # the stem's input is the same in both
                difference.add(own[names[0]].input, whole[sections[0][0].name].input)
            for name, section in own_sections.items():
                arguments = section.own(whole[name].arguments)
                alone = run_section(section.blocks_in(student), whole[name].input, arguments)
                places[name][0].add(alone, whole[name].output)
            with _giving(last, whole[sections[0][-1].name].output):
                head_output = answer_of(forward(student, batch), task.name)
            for index, found in enumerate((head_output, own_output)):
                places[task.output][index].add(found, output)
                agreeing[index].append(task.agreeing(output, found))
            count += size_of(batch)
    same_on_teacher, same_on_own = (
        None if None in same else sum(each for each in same if each) / count for same in agreeing
    )
    return Fidelity(
        images=count,
        deviations=tuple(
            Deviation(name=name, on_teacher=alone.relative(), on_own=chain.relative())
            for name, (alone, chain) in places.items()
        ),
        same_class_on_teacher=same_on_teacher,
        same_class_on_own=same_on_own,
    )


@dataclass
class _Difference:
    """Squares of the difference and of the reference, summed over batches in double precision, for each tensor."""

    squares: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, found: Batch, reference: Batch) -> None:
        for place, (tensor, expected) in enumerate(zip(tensors_of(found), tensors_of(reference), strict=True)):
            if expected.is_floating_point():
                error, whole = self.squares.get(place, (0.0, 0.0))
                error += float((tensor - expected).double().square().sum())
                self.squares[place] = error, whole + float(expected.double().square().sum())

    def relative(self) -> float | None:
        """Mean over the tensors, whose units may differ."""
        sums = self.squares.values()
        if not sums or any(not whole or not math.isfinite(error) or not math.isfinite(whole) for error, whole in sums):
            return None
        return math.fsum(math.sqrt(error / whole) for error, whole in sums) / len(sums)


@contextmanager
def _giving(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let the block return this hidden state instead of its own while the context is open."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
