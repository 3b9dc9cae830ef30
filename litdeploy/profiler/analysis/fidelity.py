"""Where the student's error enters, and how it compounds: each section on its teacher's input and in its own chain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward, size_of
from litdeploy.data import prepared
from litdeploy.errors import DataError
from litdeploy.exporter.evidence import open_test_data
from litdeploy.networks import Network, logits_of
from litdeploy.networks.sections import container, recording, run_section
from litdeploy.profiler.schema import Deviation, Fidelity
from litdeploy.runtime.eager import placed
from litdeploy.storage.records import Manifest

STEM = "stem"
LOGITS, IMAGES = "logits", "images"

_IMAGES = 256
_BATCH_SIZE = 64


def measure_fidelity(
    manifest: Manifest, teacher: Network, student: Network, sections: Sequence[str], device: torch.device
) -> Fidelity:
    """Measures fidelity on test images of the bundle's own dataset.

    Args:
        sections: the teacher's, in its order.

    Raises:
        DataError: the dataset is not to be had, or has no test images.
    """
    # Of a large split only what is compared is decoded, and in this process.
    settings = manifest.recipe.data.model_copy(update={"resident": False, "workers": 0})
    data = open_test_data(manifest, settings, student, device)
    split = data.test
    if not len(split):
        raise DataError(f"{data.source}: its test split is empty.")
    rows = torch.linspace(0, len(split) - 1, min(len(split), _IMAGES)).round().long()
    picks = split.pick(torch.split(rows, _BATCH_SIZE))
    batches = (prepared(picked.images(), student.spec.input, picked.labels_N) for picked in picks)
    modules = placed(teacher, device, "fp32"), placed(student, device, "fp32")
    return compare_sections(*modules, sections, batches, student.spec.translates)


@torch.no_grad()
def comparable(teacher: Network, student: Network, sections: Sequence[str]) -> bool:
    """Whether there are sections, and each takes and gives the same shapes in both: a narrower student's do not.

    Args:
        sections: names of containers that both have.
    """
    with recording(teacher.module, sections) as whole, recording(student.module, sections) as own:
        forward(teacher.module, teacher.example(1))
        forward(student.module, teacher.example(1))
    return bool(sections) and all(
        (own[name].input.shape, own[name].output.shape) == (whole[name].input.shape, whole[name].output.shape)
        for name in sections
    )


@torch.no_grad()
def compare_sections(
    teacher: nn.Module,
    student: nn.Module,
    sections: Sequence[str],
    batches: Iterable[Batch],
    makes_images: bool = False,
) -> Fidelity:
    """Compares a student with its teacher, place by place.

    Args:
        teacher, student: in eval mode, on the batches' device.
        sections: at least one; the student has a container of each name too.
        batches: what both take, at least one.
        makes_images: whether they give images in place of logits.
    """
    last = IMAGES if makes_images else LOGITS
    places = {place: (_Difference(), _Difference()) for place in (STEM, *sections, last)}
    count, same_on_teacher, same_on_own = 0, 0, 0
    with recording(teacher, sections) as whole, recording(student, sections) as own:
        for batch in batches:
            logits_NK, own_logits_NK = logits_of(forward(teacher, batch)), logits_of(forward(student, batch))
            # The student's own chain first: running its parts by themselves records anew.
            for name in sections:
                places[name][1].add(own[name].output, whole[name].output)
            for difference in places[STEM]:  # both sides have the images themselves as its input
                difference.add(own[sections[0]].input, whole[sections[0]].input)
            for name in sections:
                alone = run_section(list(container(student, name)), whole[name].input, whole[name].arguments)
                places[name][0].add(alone, whole[name].output)
            with _giving(container(student, sections[-1])[-1], whole[sections[-1]].output):
                head_logits_NK = logits_of(forward(student, batch))
            for difference, found_NK in zip(places[last], (head_logits_NK, own_logits_NK), strict=True):
                difference.add(found_NK, logits_NK)
            count += size_of(batch)
            if makes_images:
                continue
            classes_N = logits_NK.argmax(1)
            same_on_teacher += int((head_logits_NK.argmax(1) == classes_N).sum())
            same_on_own += int((own_logits_NK.argmax(1) == classes_N).sum())
    return Fidelity(
        images=count,
        deviations=tuple(
            Deviation(name=name, on_teacher=alone.relative(), on_own=chain.relative())
            for name, (alone, chain) in places.items()
        ),
        same_class_on_teacher=None if makes_images else same_on_teacher / count,
        same_class_on_own=None if makes_images else same_on_own / count,
    )


@dataclass
class _Difference:
    """Squares summed over batches, in double precision."""

    error: float = 0.0
    reference: float = 0.0

    def add(self, found: Tensor, reference: Tensor) -> None:
        self.error += float((found - reference).double().square().sum())
        self.reference += float(reference.double().square().sum())

    def relative(self) -> float | None:
        if not self.reference or not math.isfinite(self.error) or not math.isfinite(self.reference):
            return None
        return math.sqrt(self.error / self.reference)


@contextmanager
def _giving(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While it is open, the block returns this hidden state in place of its own."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
